"""Passwords in URIs: they are used, and neither shown nor stored.

A password stands behind the user (`http://me:password@host`, `postgresql://me:password@host/db`) or in the query
(`...?user=me&password=...`).
"""

import re

# As each kind of URI is read: a web address ends at its first slash (its password may hold an @), SQLAlchemy ends a
# password at the first @ (it may hold a slash).
_WEB = re.compile(r"(\bhttps?://[^:/@\s?#]*):[^/\s?#]*@")
_DATABASE = re.compile(r"(\b(?!https?:)[\w+.-]+://[^:/\s]*):[^@\s]*@")
_QUERY = re.compile(r"([?&;])(\w*(?:password|passwd|pwd)=)[^&;\s'\"]*", re.IGNORECASE)


def redacted(text: str) -> str:
    """Return a message with *** in place of the passwords of its URIs."""
    text = _DATABASE.sub(r"\1:***@", _WEB.sub(r"\1:***@", text))
    return _QUERY.sub(r"\1\2***", text)


def without_password(uri: str) -> str:
    """Return the URI without its password, as it may be stored and compared; the user stays."""
    uri = _DATABASE.sub(r"\1@", _WEB.sub(r"\1@", uri))
    uri = _QUERY.sub(lambda found: "?" if found[1] == "?" else "", uri)
    return uri.replace("?&", "?").removesuffix("?")
