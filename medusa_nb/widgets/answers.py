"""The answer browser: leaf through answered conversations, by how they ended, how long they are, loops."""

from IPython.display import display

from medusa_nb.widgets.live import render, watched

ANY = "any"


def conversation_html(row: dict) -> str:
    """A conversation as HTML: each turn in a box, with how the answer ended."""
    facts = [row["id"]]
    if "completion_tokens" in row:
        facts.append(f"{row['completion_tokens']} tokens")
    if row.get("finish_reason"):
        facts.append(f"ended by {row['finish_reason']}")
    if row.get("loop"):
        facts.append("repetition loop")
    return render("conversation", facts=" · ".join(facts), messages=row["messages"])


def conversation_text(row: dict) -> str:
    """The same as plain text."""
    turns = [f"{message['role']}:\n{message['content']}" for message in row["messages"]]
    facts = f"[{row['id']} · {row.get('completion_tokens', 0)} tokens · {row.get('finish_reason', '')}]"
    return f"{facts}\n" + "\n\n".join(turns)


def select(rows: list[dict], finish_reason: str = ANY, loops: str = ANY, tokens: tuple[int, int] = (0, 10**9)) -> list:
    """The rows that ended this way, that loop (``"yes"``), do not (``"no"``) or either, within a range of lengths."""
    return [
        row
        for row in rows
        if finish_reason in (ANY, row.get("finish_reason"))
        and loops in (ANY, "yes" if row.get("loop") else "no")
        and tokens[0] <= row.get("completion_tokens", 0) <= tokens[1]
    ]


def browse(rows: list[dict], shown: int = 1) -> None:
    """The first ``shown`` rows as text; where a front end answers, filters and a slider over all of them."""
    if not watched() or not rows:
        for row in rows[:shown]:
            print(conversation_text(row), end="\n\n")
        return
    import ipywidgets

    longest = max(row.get("completion_tokens", 0) for row in rows)
    reasons = sorted({row["finish_reason"] for row in rows if row.get("finish_reason")})
    ended = ipywidgets.Dropdown(options=[ANY, *reasons], description="ended by")
    loops = ipywidgets.Dropdown(options=[ANY, "no", "yes"], description="loops")
    length = ipywidgets.IntRangeSlider(value=(0, longest), min=0, max=longest, description="tokens")
    number = ipywidgets.IntSlider(min=1, max=len(rows), description="answer", layout={"width": "24em"})
    count, view = ipywidgets.Label(), ipywidgets.HTML()
    found: list[dict] = []

    def filter_rows(*_) -> None:
        found[:] = select(rows, ended.value, loops.value, length.value)
        count.value = f"{len(found):,} of {len(rows):,} answers"
        number.disabled = len(found) < 2
        number.max = max(1, len(found))
        if number.value == 1:
            turn()
        else:
            number.value = 1

    def turn(*_) -> None:
        view.value = conversation_html(found[number.value - 1]) if found else "<p>No answer is like that.</p>"

    number.observe(turn, names="value")
    for control in (ended, loops, length):
        control.observe(filter_rows, names="value")
    filter_rows()
    display(ipywidgets.VBox([ipywidgets.HBox([ended, loops]), ipywidgets.HBox([length, number, count]), view]))
