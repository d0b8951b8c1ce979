use super::is_host;

#[test]
fn hosts_are_names_or_addresses_with_a_port_or_none() {
    for text in [
        "",
        "localhost",
        "my_host.example",
        "node-1:19910",
        "node-1:",
        "127.0.0.1:19910",
        "[::1]",
        "[2001:db8::1]:19910",
    ] {
        assert!(is_host(text), "{text}");
    }
    for text in [
        "a b",
        "a/b",
        "user@host",
        "user:password@host:80",
        "host:port",
        "host:80:80",
        "::1",
        "[::1",
        "h<st",
        "http://host/",
    ] {
        assert!(!is_host(text), "{text}");
    }
}
