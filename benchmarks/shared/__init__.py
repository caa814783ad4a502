"""What all measurements stand on: processes measured from outside, models made up, pages."""
