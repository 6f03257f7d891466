"""``geoaccel view``: a result in the browser, live or as one file to share."""
