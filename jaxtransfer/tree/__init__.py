"""Trees: paths, rules, partition and combine, two-sided diffs, scanned stacks, weights that are more than arrays."""

from jaxtransfer.tree.diff import Diff as Diff
from jaxtransfer.tree.diff import TreeError as TreeError
from jaxtransfer.tree.diff import diff as diff
from jaxtransfer.tree.fingerprint import digest as digest
from jaxtransfer.tree.fingerprint import fingerprint as fingerprint
from jaxtransfer.tree.partition import combine as combine
from jaxtransfer.tree.partition import partition as partition
from jaxtransfer.tree.paths import flatten as flatten
from jaxtransfer.tree.paths import map_with_path as map_with_path
from jaxtransfer.tree.paths import unflatten as unflatten
from jaxtransfer.tree.rules import REQUIRED as REQUIRED
from jaxtransfer.tree.rules import Rule as Rule
from jaxtransfer.tree.rules import RuleError as RuleError
from jaxtransfer.tree.rules import match as match
from jaxtransfer.tree.stacks import layers_of as layers_of
from jaxtransfer.tree.stacks import layout as layout
from jaxtransfer.tree.stacks import stack as stack
from jaxtransfer.tree.stacks import unstack as unstack
