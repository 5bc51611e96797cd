"""What a dataset holds, in numbers: counted, described, and shown as JSON and as one HTML page."""
