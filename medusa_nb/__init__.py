"""Medusa in notebooks: train Medusa heads on a frozen language model and measure what they gain."""
