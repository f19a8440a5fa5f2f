"""How the extension is built: read by setup.py and by installers, never installed."""
