//! Traefik, Caddy, frp, Envoy.

use super::{EdgeError, Facts};
use crate::model::UdpHeader;

pub(super) fn traefik(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.only_tcp("Traefik as it is known here")?;
    let (name, relay, port) = (facts.name, facts.edge.relay, facts.edge.public_port);
    let preface = facts.preface(
        "#",
        "Traefik",
        &[
            "This is dynamic configuration (file provider). The static one needs the entry point:",
            &format!("  entryPoints: {{ \"{name}\": {{ address: \":{port}\" }} }}"),
            "Before Traefik 3.5.2 it is loadBalancer.proxyProtocol.version: 2 instead of a serversTransport.",
            "HostSNI(`*`) without tls takes every connection, also of protocols in which the server speaks first.",
        ],
    );
    Ok(format!(
        "{preface}
tcp:
  serversTransports:
    \"{name}\":
      proxyProtocol:
        version: 2
  routers:
    \"{name}\":
      entryPoints: [\"{name}\"]
      rule: \"HostSNI(`*`)\"
      service: \"{name}\"
  services:
    \"{name}\":
      loadBalancer:
        serversTransport: \"{name}\"
        servers:
          - address: \"{relay}\"
"
    ))
}

/// JSON, which has no comments: what has to be said is in a key that Caddy passes over.
pub(super) fn caddy(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.only_tcp("Caddy's layer4 module")?;
    let (relay, port) = (facts.edge.relay, facts.edge.public_port);
    let listen: Vec<String> = match (facts.v4, facts.v6) {
        (true, false) => vec![format!("tcp4/0.0.0.0:{port}")],
        (false, true) => vec![format!("tcp6/[::]:{port}")],
        _ => vec![format!("tcp/:{port}")],
    };
    let config = serde_json::json!({
        "apps": { "layer4": { "servers": { facts.name: {
            "listen": listen,
            "routes": [ { "handle": [ {
                "handler": "proxy",
                "proxy_protocol": "v2",
                "upstreams": [ { "dial": [ format!("tcp/{relay}") ] } ]
            } ] } ]
        } } } }
    });
    let preface = facts.preface(
        "//",
        "Caddy",
        &[
            "It takes a Caddy built with github.com/mholt/caddy-l4. JSON has no comments: leave these lines out.",
        ],
    );
    Ok(format!("{preface}{config:#}\n"))
}

pub(super) fn frp(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.needs_header("frp", UdpHeader::First)?;
    let Facts {
        name,
        protocol,
        edge,
        ..
    } = facts;
    let preface = facts.preface(
        "#",
        "frp",
        &[
            "It belongs in frpc.toml of the client that connects to the relay; frpc's own address is the proxy's.",
        ],
    );
    Ok(format!(
        "{preface}
[[proxies]]
name = \"{name}\"
type = \"{protocol}\"
localIP = \"{}\"
localPort = {}
remotePort = {}
transport.proxyProtocolVersion = \"v2\"
",
        edge.relay.ip(),
        edge.relay.port(),
        edge.public_port
    ))
}

pub(super) fn envoy(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.only_tcp("Envoy")?;
    let (name, relay, port) = (facts.name, facts.edge.relay, facts.edge.public_port);
    let (address, compat) = match (facts.v4, facts.v6) {
        (true, false) => ("0.0.0.0", ""),
        (false, true) => ("\"::\"", ""),
        _ => ("\"::\"", ", ipv4_compat: true"),
    };
    let (ip, relay_port) = (relay.ip(), relay.port());
    let preface = facts.preface(
        "#",
        "Envoy",
        &[
            "With ipv4_compat one listener takes both families and announces IPv4 clients as ::ffff:a.b.c.d;",
            "mmproxyctl takes those for the IPv4 clients they are.",
        ],
    );
    Ok(format!(
        "{preface}
static_resources:
  listeners:
  - name: \"{name}\"
    address:
      socket_address: {{ address: {address}, port_value: {port}{compat} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy
          stat_prefix: \"{name}\"
          cluster: \"{name}\"
          idle_timeout: 86400s
  clusters:
  - name: \"{name}\"
    type: STATIC
    connect_timeout: 5s
    transport_socket:
      name: envoy.transport_sockets.upstream_proxy_protocol
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport
        config: {{ version: V2 }}
        transport_socket:
          name: envoy.transport_sockets.raw_buffer
          typed_config:
            \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer
    load_assignment:
      cluster_name: \"{name}\"
      endpoints:
      - lb_endpoints:
        - endpoint:
            address:
              socket_address: {{ address: \"{ip}\", port_value: {relay_port} }}
"
    ))
}
