//! dnsdist.

use super::{EdgeError, Facts};
use crate::model::{Protocol, UdpHeader};

pub(super) fn dnsdist(facts: &Facts<'_>) -> Result<String, EdgeError> {
    facts.needs_header("dnsdist", UdpHeader::Every)?;
    let (name, relay) = (facts.name, facts.edge.relay);
    let (tcp_only, other) = match facts.protocol {
        Protocol::Udp => (
            "",
            "For queries over TCP the same address needs a second instance, without protocol=udp.",
        ),
        Protocol::Tcp => (
            "    tcpOnly = true,\n",
            "This instance is protocol=tcp; queries over UDP need a second one with protocol=udp and go here\nwithout tcpOnly.",
        ),
    };
    let other: Vec<&str> = other.split('\n').collect();
    let mut lines = vec![
        "A version 2 header goes with every query over UDP, and in front of every TCP connection.",
        "Its health checks say LOCAL: the DNS server sees them come from this proxy.",
    ];
    lines.extend(other);
    let preface = facts.preface("--", "dnsdist", &lines);
    Ok(format!(
        "{preface}
newServer({{
    address = \"{relay}\",
    name = \"{name}\",
{tcp_only}    useProxyProtocol = true,
    mustResolve = false,
}})
"
    ))
}
