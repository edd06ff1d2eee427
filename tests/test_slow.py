"""`slow.txt` against the tests that there are."""


def test_every_line_names_a_test(lost):
    """Where a test was renamed, or its parameters, the line must be too, or the test runs by default."""
    assert lost == []
