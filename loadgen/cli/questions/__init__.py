"""Commands that answer a question: why a query was late, and how many GPUs a load needs."""
