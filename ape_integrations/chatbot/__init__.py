"""What chatbots over a folder of files have in common, on a page and in a terminal.

A framework's pipeline (`Pipeline`) reads files, retrieves and answers; everything around it is here
and knows no framework: the files (`library`), conversations and what the cache did for each answer
(`conversation`, `figures`), the page (`page`, Gradio) and the terminal (`terminal`, rich).
"""

from __future__ import annotations

from ape_integrations.chatbot.conversation import Conversation, Turn
from ape_integrations.chatbot.files import Passage
from ape_integrations.chatbot.library import Library
from ape_integrations.chatbot.pipeline import Pipeline

__all__ = ["Conversation", "Library", "Passage", "Pipeline", "Turn"]
