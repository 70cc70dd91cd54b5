"""What was found, as one document and as one page."""
