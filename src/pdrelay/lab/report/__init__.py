"""The report: figures from raw files (one module a section), then one HTML file from them."""
