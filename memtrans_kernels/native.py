"""Stand-in until the build lands."""
def status():
    return False, "not built"
