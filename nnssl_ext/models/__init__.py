"""Networks: encoders behind one contract, and what is built around them."""
