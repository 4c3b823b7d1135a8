"""Everyday questions: the domain that heads trained on code have never seen."""

from itertools import product

QUESTIONS = (
    "Explain {topic} to a ten-year-old in three sentences.",
    "Write a short, friendly message to a neighbour about {topic}.",
    "What should a beginner know about {topic}? Answer in one short paragraph.",
    "Tell a very short story about {topic}.",
    "Why do people care about {topic}? Answer in two or three sentences.",
    "Describe a quiet morning that has something to do with {topic}.",
    "Give one piece of advice about {topic}, and say why it helps.",
    "How has {topic} changed over the last hundred years? Be brief.",
    "Compare {topic} with something from nature, in a few sentences.",
    "What do most people get wrong about {topic}? Answer briefly.",
)
TOPICS = (
    *("growing tomatoes", "the water cycle", "sleeping well", "learning to swim", "baking bread", "old letters"),
    *("the night train", "a rainy holiday", "moving to a new city", "keeping bees", "the school orchestra"),
    *("a lost umbrella", "the tides", "making tea", "friendship", "a long walk", "the first snow", "grandparents"),
    *("riding a bicycle", "the village market", "stars", "a broken clock", "writing a diary", "choosing shoes"),
    *("a shared kitchen", "honey", "lighthouses", "being late", "museums", "a good breakfast", "autumn leaves"),
    *("small dogs", "learning the piano", "the harbour", "recycling", "wool", "a power cut", "chess"),
)


def everyday_questions() -> list[tuple[str, str]]:
    """``(topic, question)`` for every question about every topic."""
    return [(topic, question.format(topic=topic)) for topic, question in product(TOPICS, QUESTIONS)]
