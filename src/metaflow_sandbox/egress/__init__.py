"""The way out of a sandbox: an HTTP proxy on the host that lets through what `network=` lists.

A sandbox without any other network reaches the internet by it: `CONNECT` tunnels (HTTPS and
everything else that clients send through one) and plain `http://` requests. A host is compared
with the rules by its name, before it is looked up; then every address that it has is checked,
and the connection is made to a checked address itself. So nothing leaves by the look-up of a
name that isn't listed, and no name leads to this machine, its networks or a cloud's metadata.
What is sent to a listed host is not looked at: whoever can write there can carry data out.

`addresses`  what is public, and not this machine's own
`rules`      which hosts and ports are allowed
`streams`    sockets, and the tunnel between two of them
`messages`   what is asked of the proxy, and what it answers by itself
`exchange`   one plain HTTP request and its response
`proxy`      the server
`variables`  how programs inside find it
"""
