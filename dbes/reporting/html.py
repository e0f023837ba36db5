"""HTML pages that need nothing but themselves: our scripts and nobody else's, the data packed into them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import os
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dbes.compressed import gunzip
from dbes.errors import FileError, ResultError
from dbes.files import write_text
from dbes.text import legible
from dbes.wording import counted, p_words, share, shares


def render(template: str, *, scripts: tuple[str, ...] = (), payload: dict[str, Any] | None = None, **values: Any) -> str:
    """A page whose only scripts are ours, by hash: the page's policy forbids any other script and every request."""
    environment = Environment(
        loader=PackageLoader("dbes.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["legible"] = legible
    assert environment.loader is not None
    sources = [vega_bundle(), *(environment.loader.get_source(environment, name)[0] for name in scripts)] if scripts else []
    inlined = [source.replace("</script", "<\\/script").replace("<!--", "<\\!--") for source in sources]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in inlined)
    return environment.get_template(template).render(
        style=Markup(environment.loader.get_source(environment, "page.css")[0]),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {hashes or chr(39) + 'none' + chr(39)}",
        scripts=[Markup(each) for each in inlined],
        data="" if payload is None else packed(payload),
        dbes_version=version("dbes"),
        isnan=math.isnan,
        share=share,
        shares=shares,
        p_words=p_words,
        counted=counted,
        **values,
    )


def packed(payload: dict[str, Any]) -> str:
    """JSON, gzipped, in base64: no character of it can end a script element, and the same payload gives the same bytes."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), compresslevel=9, mtime=0)).decode("ascii")


def unpacked(page: str) -> dict[str, Any]:
    """The payload of a page."""
    found = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', page)
    if found is None:
        raise ResultError("this page holds no data")
    return json.loads(gunzip(base64.b64decode(found.group(1)), where="page", error=ResultError))


def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; bundled once for each version and kept in the user's cache."""
    import vl_convert

    name = f"vega-bundle-{version('vl-convert-python')}.js"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbes" / name
    with suppress(OSError, UnicodeDecodeError):
        if path.is_file():
            return path.read_text("utf-8")
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    with suppress(FileError):  # a home that cannot be written to costs ten seconds each time, nothing else
        write_text(path, bundle)
    return bundle
