"""What the cache did for each answer: in a line, and as the page's side panel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ape_integrations.chatbot.conversation import Turn
from ape_integrations.store.sizes import format_size

#: Answers that the plot and the table show; older ones scroll out.
_SHOWN = 20

_WIDTH, _HEIGHT = 320, 96


def format_seconds(seconds: float) -> str:
    """Write a time as people read it: ``"8 ms"``, ``"1.3 s"``."""
    return f"{1000 * seconds:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def figures_line(turn: Turn) -> str:
    """Say in one line what the cache did for an answer; empty where that is not known."""
    if not turn.report:
        return ""
    parts = [
        f"first token after {format_seconds(turn.report['first_token_seconds'])}",
        f"{turn.report['hits']} of {turn.report['contexts']} passages from the cache",
        f"{format_size(int(turn.report['bytes_loaded']))} read",
    ]
    if turn.sequential is not None:
        parts.append(_sequentially(turn))
    return ", ".join(part for part in parts if part)


def _sequentially(turn: Turn) -> str:
    assert turn.sequential is not None
    if turn.sequential.first_token_seconds is None:
        return f"no comparison: {turn.sequential.problem}" if turn.sequential.problem else ""
    seconds = format_seconds(turn.sequential.first_token_seconds)
    return f"sequentially after {seconds} ({' '.join(_factor(turn))})"


def _factor(turn: Turn) -> tuple[str, str]:
    """Return how many times sooner or later the first token came, and which of the two."""
    gain = turn.gain or 1.0
    return (f"{gain:.1f}x", "sooner") if gain >= 1 else (f"{1 / gain:.1f}x", "later")


# The side panel ----------------------------------------------------------------------------------


def panel(turns: Sequence[Turn]) -> str:
    """Return the side panel as HTML: the last answer, a plot over the session, a table."""
    numbered = [(number, turn) for number, turn in enumerate(turns, 1) if turn.report]
    if not numbered:
        return '<p class="ape-dim">Figures appear here with the first answer.</p>'
    shown = numbered[-_SHOWN:]
    return _last(*shown[-1]) + _plot(shown) + _table(shown) + _session(numbered)


def _last(number: int, turn: Turn) -> str:
    report = turn.report
    hits, misses = int(report["hits"]), int(report["misses"])
    figures = [(format_seconds(report["first_token_seconds"]), "to first token")]
    if turn.sequential is not None and turn.sequential.first_token_seconds is not None:
        seconds = format_seconds(turn.sequential.first_token_seconds)
        figures += [(seconds, "sequentially"), _factor(turn)]
    rows = [
        ("Passages from the cache", f"{hits} of {int(report['contexts'])}"),
        ("Encoded for this answer", str(misses)),
        ("Read from the store", _loaded(turn)),
    ]
    if reused := int(report.get("tokens_reused", 0)):
        rows.append(("Kept of the conversation", f"{reused} tokens"))
    note = ""
    if turn.state == "comparing":
        note = '<p class="ape-dim">The same prompt is running sequentially ...</p>'
    elif turn.sequential is not None:
        note = _comparison(turn)
    big = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    small = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return f'<h3>Answer {number}</h3><div class="ape-big">{big}</div><dl>{small}</dl>{note}'


def _loaded(turn: Turn) -> str:
    loaded = int(turn.report["bytes_loaded"])
    if loaded == 0 and turn.report["hits"]:
        return "nothing, it was in memory"
    return format_size(loaded)


def _comparison(turn: Turn) -> str:
    assert turn.sequential is not None
    if turn.sequential.problem:
        return f'<p class="ape-dim">No comparison: {escape(turn.sequential.problem)}</p>'
    if turn.sequential.answer == turn.answer:
        return '<p class="ape-dim">Sequentially the answer is word for word the same.</p>'
    return (
        '<details class="ape-other"><summary>The sequential answer differs</summary>'
        f"<div>{escape(turn.sequential.answer) or '(no answer)'}</div></details>"
    )


def _plot(numbered: Sequence[tuple[int, Turn]]) -> str:
    """Draw a bar for each answer, and one behind it for the same prompt read sequentially."""
    highest = max(_seconds(turn) for _, turn in numbered)
    step = min(_WIDTH / len(numbered), 40)
    bars = []
    for index, (number, turn) in enumerate(numbered):
        left = index * step
        own = turn.report["first_token_seconds"]
        title = f"Answer {number}: {escape(figures_line(turn))}"
        both = [_bar(left + 0.46 * step, 0.36 * step, own / highest, "ape-own")]
        if turn.sequential is not None and turn.sequential.first_token_seconds is not None:
            share = turn.sequential.first_token_seconds / highest
            both.insert(0, _bar(left + 0.1 * step, 0.36 * step, share, "ape-sequential"))
        bars.append(f"<g><title>{title}</title>{''.join(both)}</g>")
    return (
        "<figure><figcaption>Time to first token, up to "
        f"{format_seconds(highest)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Time to first token">'
        f'<line x1="0" y1="{_HEIGHT - 0.5}" x2="{_WIDTH}" y2="{_HEIGHT - 0.5}"/>'
        f'{"".join(bars)}</svg><p class="ape-legend"><i class="ape-own"></i>APE'
        '<i class="ape-sequential"></i>sequential, where compared</p></figure>'
    )


def _seconds(turn: Turn) -> float:
    other = turn.sequential.first_token_seconds if turn.sequential else None
    return max(float(turn.report["first_token_seconds"]), other or 0.0, 1e-6)


def _bar(x: float, width: float, share: float, kind: str) -> str:
    height = max(share * (_HEIGHT - 4), 1.5)
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{_HEIGHT - height:.1f}" width="{width:.1f}"'
        f' height="{height:.1f}" rx="1.5"/>'
    )


def _table(numbered: Sequence[tuple[int, Turn]]) -> str:
    rows = "".join(_row(number, turn) for number, turn in reversed(numbered))
    titles = ("", "first token", "sequential", "hits", "loaded")
    head = "".join(f"<th>{title}</th>" for title in titles)
    return (
        f'<div class="ape-table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(number: int, turn: Turn) -> str:
    report = turn.report
    other = turn.sequential.first_token_seconds if turn.sequential else None
    cells = (
        str(number),
        format_seconds(report["first_token_seconds"]),
        "" if other is None else format_seconds(other),
        f"{int(report['hits'])}/{int(report['contexts'])}",
        format_size(int(report["bytes_loaded"])),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _session(numbered: Iterable[tuple[int, Turn]]) -> str:
    reports = [turn.report for _, turn in numbered]
    hits = sum(int(report["hits"]) for report in reports)
    contexts = sum(int(report["contexts"]) for report in reports)
    loaded = format_size(sum(int(report["bytes_loaded"]) for report in reports))
    return (
        f'<p class="ape-dim">This conversation: {hits} of {contexts} passages from the cache, '
        f"{loaded} read.</p>"
    )
