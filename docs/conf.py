"""The documentation site: `make docs` builds it into build/docs."""

import stochastic_depth as sd

project = "stochastic-depth"
author = "The stochastic-depth developers"
copyright = f"2026, {author}"
release = version = sd.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the changelog's page begins with what it includes

autodoc_mock_imports = ["lightning", "transformers"]  # whose callbacks are only described
autodoc_typehints = "none"  # the docstrings say what the arguments are
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Reference", "Shape"]

html_theme = "furo"
html_title = f"stochastic-depth {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
