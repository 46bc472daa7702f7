"""What is measured of a source, and the page that shows it."""
