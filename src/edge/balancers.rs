//! HAProxy and nginx.

use super::{EdgeError, Facts};

/// frontend and backend; complete but for `global`.
pub(super) fn haproxy(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.only_tcp("HAProxy")?;
    let (name, relay, port) = (facts.name, facts.edge.relay, facts.edge.public_port);
    let bind = match (facts.v4, facts.v6) {
        (true, false) => format!("bind 0.0.0.0:{port}"),
        (false, true) => format!("bind :::{port} v6only"),
        _ => format!("bind :::{port} v4v6"),
    };
    let preface = facts.preface(
        "#",
        "HAProxy",
        &[
            "v4v6 binds both families. Some versions announce IPv4 clients as ::ffff:a.b.c.d then; mmproxyctl",
            "takes those for the IPv4 clients they are.",
            "Without send-proxy-v2 the relay refuses every connection. Leave \"check\" out: the service would",
            "see each health check as a connection of this proxy's.",
        ],
    );
    Ok(format!(
        "{preface}
frontend {name}
    {bind}
    mode tcp
    option clitcpka
    timeout client 24h
    default_backend {name}

backend {name}
    mode tcp
    option srvtcpka
    timeout connect 5s
    timeout server 24h
    server {name} {relay} send-proxy-v2
"
    ))
}

/// A `stream` block.
pub(super) fn nginx(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.only_tcp("nginx")?;
    let (relay, port) = (facts.edge.relay, facts.edge.public_port);
    let mut listen = String::new();
    if facts.v4 {
        listen.push_str(&format!("        listen 0.0.0.0:{port} so_keepalive=on;\n"));
    }
    if facts.v6 {
        listen.push_str(&format!(
            "        listen [::]:{port} ipv6only=on so_keepalive=on;\n"
        ));
    }
    let preface = facts.preface(
        "#",
        "nginx",
        &[
            "It belongs at the top level of nginx.conf, beside http, not in it; the stream module is a package of",
            "its own with many distributions (Debian: libnginx-mod-stream). nginx sends header version 1.",
        ],
    );
    Ok(format!(
        "{preface}
stream {{
    server {{
{listen}        proxy_pass {relay};
        proxy_protocol on;
        proxy_connect_timeout 5s;
        proxy_timeout 24h;
        proxy_socket_keepalive on;
    }}
}}
"
    ))
}
