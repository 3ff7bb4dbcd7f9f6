"""Reading, checking and converting weights."""
