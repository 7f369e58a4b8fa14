"""What was measured, for people: charts and one page."""
