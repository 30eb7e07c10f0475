"""A card of a sandboxed step is there, and shown without any right of its viewer's."""

FLOW = """
    from metaflow import FlowSpec, card, current, sandbox, step
    from metaflow.cards import Markdown

    class Carded(FlowSpec):
        @card(type="blank")
        @sandbox
        @step
        def start(self):
            current.card.append(Markdown("# Made in a sandbox <script>alert(1)</script>"))
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Carded()
"""


def test_a_card_comes_out_wrapped_in_a_frame_without_rights(project):
    project.write("flow.py", FLOW)
    project.run("flow.py", "run").ok()
    page = project.client(
        """
        from metaflow.cards import get_cards
        answer = [c.get() for c in get_cards(Flow("Carded").latest_run["start"].task)]
        """
    )
    assert len(page) == 1
    html = page[0]
    assert html.count("<iframe") == 1
    assert 'sandbox="allow-scripts"' in html
    assert "default-src 'none'" in html
    # All that the sandbox wrote is inside of one attribute.
    before, _, rest = html.partition('srcdoc="')
    inside, _, after = rest.partition('"')
    assert "<script" not in before + after
    assert "&lt;script" in inside
