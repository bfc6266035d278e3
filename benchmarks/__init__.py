"""Our code and its peers, measured side by side; no part of the installed package."""
