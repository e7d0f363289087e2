//! The clients that the headers announce: each with an address and port of its own, never used twice.
//!
//! A tuple used again within a minute meets its own TIME_WAIT, and many clients on one port meet in one
//! bind bucket: both would make a relay fail or slow down for reasons of the test.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicU64, Ordering};

/// 198.18.0.0/15 (benchmarks, RFC 2544) without its first and last address.
const ADDRESSES: u64 = (1 << 17) - 2;
/// From the first unprivileged port to the last below the ephemeral range, which begins at 32768.
const FIRST_PORT: u64 = 1024;
/// How many of those ports are used: coprime to [`ADDRESSES`], so that stepping both gives every pair once.
const PORTS: u64 = 31_741;

const _: () = assert!(FIRST_PORT + PORTS <= 32_768 && coprime(ADDRESSES, PORTS));

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A client that no header has announced before: 4 × 10⁹ of them, a day's worth at full speed.
pub(crate) fn next() -> SocketAddrV4 {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let address = u32::from(Ipv4Addr::new(198, 18, 0, 1)) + (number % ADDRESSES) as u32;
    SocketAddrV4::new(address.into(), (FIRST_PORT + number % PORTS) as u16)
}

/// Puts the PROXY v1 header of a client before what `out` will carry.
pub(crate) fn announce(out: &mut Vec<u8>, client: SocketAddrV4, relay: SocketAddrV4) {
    write!(
        out,
        "PROXY TCP4 {} {} {} {}\r\n",
        client.ip(),
        relay.ip(),
        client.port(),
        relay.port()
    )
    .expect("writing to a Vec cannot fail");
}

const fn coprime(mut a: u64, mut b: u64) -> bool {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a == 1
}
