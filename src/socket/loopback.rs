//! Connections that never leave the host: what the network between two hosts asks for is only work there.
//!
//! A congestion control that paces (BBR, the default of some distributions and cloud images) sends by a
//! timer. Over loopback nothing can be congested, and the timers were a third of the CPU time of a bulk
//! transfer (docs/performance.md), so such connections go without.

use std::cell::Cell;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use socket2::Socket;

/// The network namespace's default for new connections.
const DEFAULT: &str = "/proc/sys/net/ipv4/tcp_congestion_control";
/// These send as soon as the window allows: nothing is gained by another one.
const UNPACED: [&str; 2] = ["cubic", "reno"];
/// Part of every kernel, and allowed to every process.
const PLAIN: &[u8] = b"reno";
/// How long a reading is believed. It hardly ever changes.
const BELIEVED: Duration = Duration::from_secs(1);

thread_local! {
    /// Whether new connections of the thread's network namespace pace, with the time of the reading.
    static PACES: Cell<Option<(Instant, bool)>> = const { Cell::new(None) };
}

fn paces() -> bool {
    let now = Instant::now();
    match PACES.get() {
        Some((read, paces)) if now.duration_since(read) < BELIEVED => paces,
        _ => {
            let name = std::fs::read_to_string(DEFAULT).unwrap_or_default();
            let paces = !UNPACED.contains(&name.trim());
            PACES.set(Some((now, paces)));
            paces
        }
    }
}

/// Has a socket to, or listening at, a loopback address send without a timer. To be called before it is
/// connected: what BBR began to pace stays paced. A listener's connections inherit it.
pub(super) fn send_at_once(socket: &Socket, addr: IpAddr) {
    if addr.is_loopback() && paces() {
        // as fast as before if not
        let _ = socket.set_tcp_congestion(PLAIN);
    }
}
