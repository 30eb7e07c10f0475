"""What sandboxed steps leave for the host, of the types that people work with."""

FLOW = """
    import collections, datetime, decimal, pathlib, uuid
    import numpy, pandas
    from metaflow import FlowSpec, sandbox, step

    class Data(FlowSpec):
        @step
        def start(self):
            self.next(self.write)

        @sandbox
        @step
        def write(self):
            self.array = numpy.arange(6.0).reshape(2, 3)
            self.frame = pandas.DataFrame(
                {"a": [1, 2], "b": ["x", None], "t": pandas.to_datetime(["2020-01-01", None])}
            )
            self.series = pandas.Series([1, None], dtype="Int64", name="n")
            self.when = datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc)
            self.price = decimal.Decimal("1.10")
            self.id = uuid.UUID(int=5)
            self.path = pathlib.Path("/x/y")
            self.counts = collections.Counter("aab")
            self.nested = {"score": numpy.float64(0.5), "rows": [numpy.array(["a", "b"])]}
            self.next(self.read)

        @step
        def read(self):
            assert self.array.sum() == 15
            assert self.frame.dtypes["a"] == "int64" and self.frame.shape == (2, 3)
            assert self.frame["t"][0].year == 2020
            assert self.series.sum() == 1
            print("LOADED", self.when, self.price, self.id, self.path, self.counts["a"])
            print("NESTED", self.nested["score"], self.nested["rows"][0].tolist())
            self.next(self.end)

        @step
        def end(self):
            pass

    if __name__ == "__main__":
        Data()
"""


def test_arrays_frames_and_values_of_a_sandboxed_step_load_on_the_host(project):
    project.write("flow.py", FLOW)
    output = project.run("flow.py", "run").ok().output
    assert (
        "LOADED 2020-01-02 00:00:00+00:00 1.10 00000000-0000-0000-0000-000000000005 /x/y 2"
        in output
    )
    assert "NESTED 0.5 ['a', 'b']" in output
    answer = project.client(
        'task = Flow("Data").latest_run["write"].task; '
        "answer = [task.data.array.tolist(), int(task.data.frame['a'].sum())]"
    )
    assert answer == [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], 3]
