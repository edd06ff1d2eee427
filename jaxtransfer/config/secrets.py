"""Secrets in text: tokens and passwords belong in the environment, not in configurations, logs or tracebacks."""

import re

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
_LOGIN = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_BEARER = re.compile(r"(?i)(?<=\bbearer\s)[\w.~+/=-]{8,}")
_QUERY = re.compile(r"(?i)(?<=[?&\s\"'])((?:[\w-]*(?:token|secret|password|signature|api[_-]?key))=)[^&\s\"']+")


def redact(text: str) -> str:
    """Replaces hub tokens, bearer tokens, the login of URLs and secret query parameters by ``***``.

    Example:
      >>> redact("https://me:pass@host/x?token=abc with hf_abcdefghijkl")
      'https://***@host/x?token=*** with ***'
    """
    text = _BEARER.sub("***", _LOGIN.sub("***", _TOKEN.sub("***", text)))
    return _QUERY.sub(r"\1***", text)
