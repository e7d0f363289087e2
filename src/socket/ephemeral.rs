//! The host's range of ports for outgoing connections, and sockets that keep to one port of it.
//!
//! Why: `connect()` without a port passes over every port that any socket of the host, or what is left of
//! one in TIME_WAIT, was explicitly bound to, whatever its address: some 28,000 clients' ports, bound the
//! plain way, and no program of the host can connect any more (EADDRNOTAVAIL). A port that `connect()`
//! itself chose is shared as long as the four addresses and ports together differ. A range of one port
//! (`IP_LOCAL_PORT_RANGE`, Linux 6.3) leaves it the choice and us the port.

use std::cell::Cell;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::raw;

/// Holds for both families.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// How long a reading of the range is believed. It hardly ever changes; a connection that begins in the
/// meantime may lose its port, never its address.
const BELIEVED: Duration = Duration::from_secs(1);
/// From linux/in.h; the libc crate does not have it.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

thread_local! {
    /// Of the thread's network namespace, with the time of the reading.
    static KNOWN: Cell<Option<(Instant, Ports)>> = const { Cell::new(None) };
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ports {
    low: u16,
    high: u16,
}

impl Ports {
    /// No port at all: where the range cannot be read, ports are bound the plain way.
    const NONE: Self = Self { low: 1, high: 0 };

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split_whitespace();
        let low = words.next()?.parse().ok()?;
        let high = words.next()?.parse().ok()?;
        Some(Self { low, high })
    }

    fn read() -> Self {
        let text = std::fs::read_to_string(RANGE).unwrap_or_default();
        Self::parse(&text).unwrap_or(Self::NONE)
    }

    fn all(self) -> RangeInclusive<u16> {
        self.low..=self.high
    }
}

/// Whether the host takes this port for outgoing connections of its own. The kernel ignores a socket's
/// range that lies outside of the host's.
pub(super) fn contains(port: u16) -> bool {
    let now = Instant::now();
    let ports = match KNOWN.get() {
        Some((read, ports)) if now.duration_since(read) < BELIEVED => ports,
        _ => {
            let ports = Ports::read();
            KNOWN.set(Some((now, ports)));
            ports
        }
    };
    ports.all().contains(&port)
}

/// Has `connect()` choose this port or fail.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.3.
pub(super) fn keep_to(socket: &impl AsFd, port: u16) -> io::Result<()> {
    let range = u32::from(port) << 16 | u32::from(port);
    raw::set(socket, libc::IPPROTO_IP, IP_LOCAL_PORT_RANGE, range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_as_the_kernel_writes_it() {
        let ports = Ports::parse("32768\t60999\n").unwrap();
        assert_eq!(ports.all(), 32_768..=60_999);
        assert_eq!(Ports::parse(""), None);
        assert_eq!(Ports::parse("32768\n"), None);
        assert!(Ports::NONE.all().is_empty());
    }
}
