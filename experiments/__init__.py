"""One script per question; run from the checkout."""
