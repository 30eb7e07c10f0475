"""How programs in a sandbox find the proxy, which has its socket on their loopback device."""

PROXY_PORT = 3128


def proxy_variables() -> dict[str, str]:
    """What programs inside read to find the proxy."""
    url = f"http://127.0.0.1:{PROXY_PORT}"
    names = ("http_proxy", "https_proxy", "all_proxy")
    direct = "localhost,127.0.0.1,::1"
    variables = {n: url for name in names for n in (name, name.upper())}
    return {**variables, "no_proxy": direct, "NO_PROXY": direct}
