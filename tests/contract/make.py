"""Makes openapi.json of openapi.yaml, and docs.html of Swagger UI. Run it when either has changed:

    (cd tests/contract && npm ci --ignore-scripts)  # Only for docs.html.
    python -m tests.contract.make

tests/test_contract.py proves that both files are what this makes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

HERE = Path(__file__).parents[2]
SWAGGER_UI = Path(__file__).with_name("node_modules") / "swagger-ui-dist"

# How the page asks: the token is kept by nobody, and a wallet behind a path is asked under it.
SCRIPT = r"""
"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", paint);
paint();
const base = new URL(".", location.href);
fetch("openapi.json").then((answer) => answer.json()).then((spec) => SwaggerUIBundle({
  spec: { ...spec, servers: [{ url: base.href.replace(/\/$/, "") }] },
  dom_id: "#docs",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  persistAuthorization: false,
  tryItOutEnabled: true,
  validatorUrl: null,
}));
"""

# The page may load nothing, not even an image that stands in the style, so these are characters.
STYLE = r"""
body { margin: 0; }
html.dark-mode { color-scheme: dark; }
noscript { display: block; padding: 2em; font-family: sans-serif; }
.swagger-ui select { appearance: auto; }
.swagger-ui .servers, .swagger-ui .servers-title { display: none; }
.swagger-ui .responses-table { display: block; overflow-x: auto; }
.swagger-ui .copy-to-clipboard button::after { content: ""; display: block; width: 6px; height: 8px;
  margin: -2px auto 0; border: 1px solid #fff; box-shadow: 3px 3px 0 -1px #fff; }
.swagger-ui .model-toggle::after { content: "\203a"; text-align: center; line-height: 20px; }
html.dark-mode .swagger-ui .examples-select__section-label { color: #e4e6e6; }
"""


def make_json() -> str:
    """Return the contract as JSON, without the anchors of its YAML."""
    contract = yaml.safe_load((HERE / "openapi.yaml").read_text())
    return json.dumps(contract, indent=1, ensure_ascii=False) + "\n"


def make_docs() -> str:
    """Return Swagger UI in one page, with one script and one style, and its licences."""
    parts = {name: (SWAGGER_UI / name).read_text() for name in (
        "LICENSE", "NOTICE", "package.json", "swagger-ui-bundle.js",
        "swagger-ui-bundle.js.LICENSE.txt", "swagger-ui.css")}
    version = json.loads(parts["package.json"])["version"]
    script, style = parts["swagger-ui-bundle.js"], parts["swagger-ui.css"]
    licences = "\n".join(parts[name] for name in (
        "NOTICE", "swagger-ui-bundle.js.LICENSE.txt", "LICENSE"))
    script = re.sub(r"\n//# sourceMappingURL=.*", "", script) + SCRIPT
    style = re.sub(r'url\((?:"data:(?:[^"\\]|\\.)*"|data:[^)]*)\)', "none", style)
    style = re.sub(r"/\*# sourceMappingURL=.*?\*/", "", style) + STYLE
    if re.search("(?i)</(script|style)", script + style) or "-->" in licences or "url(" in style:
        raise ValueError("It would end too early, or load something.")
    return f"""<!DOCTYPE html>
<!-- Made by tests/contract/make.py of swagger-ui-dist {version}, which has these licences:

{licences}
-->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Wallet: the API</title>
<style>{style}</style>
</head>
<body>
<noscript>This page needs JavaScript. The contract is <a href="openapi.yaml">openapi.yaml</a>.</noscript>
<div id="docs"></div>
<script>{script}</script>
</body>
</html>
"""


if __name__ == "__main__":
    (HERE / "openapi.json").write_text(make_json())
    if SWAGGER_UI.exists():
        (HERE / "docs.html").write_text(make_docs())
    else:
        print("docs.html is as it was, since Swagger UI is not installed here: see above.")
