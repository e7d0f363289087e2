//! Which client addresses are believed at all: pure.

use std::net::IpAddr;

use super::counters::Refusal;

/// Why an announced client address is refused before any socket is made, or `None`.
///
/// `bind()` to 0.0.0.0, multicast and broadcast addresses *succeeds*, and `connect()` then takes an
/// address of this host, 127.0.0.1 for a loopback target: a trust bypass. Loopback addresses are
/// trusted by services and never belong to a client that came through a proxy. Link-local IPv6
/// addresses mean nothing without an interface, which no header carries.
pub(super) fn refusal(client: IpAddr) -> Option<Refusal> {
    match client {
        IpAddr::V4(addr) if addr.octets()[0] == 0 => Some(Refusal::ClientUnspecified),
        IpAddr::V4(addr) if addr.is_broadcast() => Some(Refusal::ClientBroadcast),
        IpAddr::V6(addr) if addr.is_unicast_link_local() => Some(Refusal::ClientLinkLocal),
        addr if addr.is_unspecified() => Some(Refusal::ClientUnspecified),
        addr if addr.is_loopback() => Some(Refusal::ClientLoopback),
        addr if addr.is_multicast() => Some(Refusal::ClientMulticast),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_no_client() {
        for (text, expected) in [
            ("0.0.0.0", Refusal::ClientUnspecified),
            ("0.1.2.3", Refusal::ClientUnspecified),
            ("::", Refusal::ClientUnspecified),
            ("127.0.0.1", Refusal::ClientLoopback),
            ("127.255.255.254", Refusal::ClientLoopback),
            ("::1", Refusal::ClientLoopback),
            ("224.0.0.1", Refusal::ClientMulticast),
            ("239.255.255.255", Refusal::ClientMulticast),
            ("ff02::1", Refusal::ClientMulticast),
            ("255.255.255.255", Refusal::ClientBroadcast),
            ("fe80::1", Refusal::ClientLinkLocal),
        ] {
            assert_eq!(refusal(text.parse().unwrap()), Some(expected), "{text}");
        }
        for good in [
            "192.0.2.1",
            "10.0.0.255",
            "169.254.1.1",
            "240.0.0.1",
            "2001:db8::1",
            "fd00::1",
        ] {
            assert_eq!(refusal(good.parse().unwrap()), None, "{good}");
        }
    }
}
