//! Services that record their datagrams, and proxies that send them, on the hosts of the TCP relay's lab.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use mmproxyctl::model::{ListenAddr, UdpHeader};
use mmproxyctl::relay::header::{Transport, V2};
use mmproxyctl::relay::udp::counters::{Dropped, Totals};
use mmproxyctl::relay::udp::{Server, Settings};
use mmproxyctl::relay::workers::Workers;
use mmproxyctl::socket::udp::udp_listeners;

use crate::relay::lab::{self, SOON};
use crate::support::net::{Host, wait_for};

/// Settings of a relay to these targets that allows everyone.
pub(crate) fn settings(header: UdpHeader, targets: &[SocketAddr]) -> Settings {
    let many = NonZeroU32::new(10_000).expect("a number");
    Settings {
        common: lab::settings(targets),
        header,
        idle_timeout: SOON,
        max_flows: many,
        max_flows_per_proxy: many,
    }
}

/// A running relay with its listen address.
pub(crate) struct Relay {
    pub(crate) server: Server,
    _workers: Workers,
    pub(crate) addr: SocketAddr,
}

impl Relay {
    /// A relay on 10.0.0.1 with one worker thread.
    pub(crate) fn start(host: &Host, settings: Settings) -> Self {
        Self::start_at(host, "10.0.0.1:0", 1, settings)
    }

    /// A relay at an address with so many worker threads.
    pub(crate) fn start_at(host: &Host, listen: &str, workers: usize, settings: Settings) -> Self {
        let listen = ListenAddr::new(listen.parse().expect("a listen address"));
        let workers = NonZeroUsize::new(workers).expect("workers");
        let listeners = host.enter(|| udp_listeners(listen, workers).expect("listen"));
        Self::start_on(host, listeners.sockets, settings)
    }

    /// A relay on bound sockets, with as many worker threads.
    pub(crate) fn start_on(host: &Host, sockets: Vec<UdpSocket>, settings: Settings) -> Self {
        let addr = sockets[0].local_addr().expect("address");
        let count = NonZeroUsize::new(sockets.len()).expect("workers");
        let (server, workers) = host.enter(|| {
            // the threads live in the network namespace of the thread that starts them
            let workers = Workers::start(count).expect("worker threads");
            let server = Server::start(&workers, sockets, settings).expect("start");
            (server, workers)
        });
        Self {
            server,
            _workers: workers,
            addr,
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        self.server.totals()
    }

    /// Waits until the counters say so.
    pub(crate) fn wait(&self, what: &str, condition: impl Fn(&Totals) -> bool) {
        wait_for(&format!("{what}: {:#?}", self.totals()), || {
            condition(&self.totals())
        });
    }

    /// Waits until this kind of drop was counted so often.
    pub(crate) fn wait_dropped(&self, kind: Dropped, times: u64) {
        self.wait(kind.name(), |totals| totals.dropped.of(kind) == times);
    }
}

/// A datagram as a service saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) peer: SocketAddr,
    pub(crate) bytes: Vec<u8>,
}

/// A UDP service on a thread.
pub(crate) struct Service {
    pub(crate) addr: SocketAddr,
    socket: UdpSocket,
    seen: Receiver<Seen>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// A service that sends back what it gets.
    pub(crate) fn echo(host: &Host, addr: &str) -> Self {
        Self::start(host, addr, |socket, seen| {
            let _ = socket.send_to(&seen.bytes, seen.peer);
        })
    }

    /// A service that never answers.
    pub(crate) fn silent(host: &Host, addr: &str) -> Self {
        Self::start(host, addr, |_, _| {})
    }

    /// A service at an address (port 0: any) that does this with each datagram.
    pub(crate) fn start(
        host: &Host,
        addr: &str,
        work: impl Fn(&UdpSocket, &Seen) + Send + 'static,
    ) -> Self {
        let socket = bind(host, self::addr(addr));
        let addr = socket.local_addr().expect("address");
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .expect("read timeout");
        let (send, seen) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let own = socket.try_clone().expect("clone");
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                    let bytes = buffer[..length].to_vec();
                    let one = Seen { peer, bytes };
                    work(&socket, &one);
                    let _ = send.send(one);
                }
            }
        });
        Self {
            addr,
            socket: own,
            seen,
            stop,
            thread: Some(thread),
        }
    }

    /// Sends without having been asked.
    pub(crate) fn say(&self, to: SocketAddr, bytes: &[u8]) {
        self.socket.send_to(bytes, to).expect("send");
    }

    /// What the service saw next.
    pub(crate) fn next(&self) -> Seen {
        self.seen
            .recv_timeout(SOON)
            .expect("a datagram at the service")
    }

    /// Whom the service saw next, and that it was these bytes.
    pub(crate) fn peer_of(&self, bytes: &[u8]) -> SocketAddr {
        let seen = self.next();
        assert_eq!(seen.bytes, bytes, "from {}", seen.peer);
        seen.peer
    }

    /// Forgets what the service has seen and was not asked for.
    pub(crate) fn forget(&self) {
        while self.seen.try_recv().is_ok() {}
    }

    /// Fails if the service has seen anything that was not asked for yet.
    pub(crate) fn assert_nothing_more(&self) {
        match self.seen.recv_timeout(Duration::ZERO) {
            Err(RecvTimeoutError::Timeout) => {}
            other => panic!("reached the service: {other:?}"),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A socket at an address, which another one may have had a moment ago: see `wait_sockets_to`.
fn bind(host: &Host, addr: SocketAddr) -> UdpSocket {
    let mut bound = None;
    wait_for(&format!("{addr} to be free"), || {
        bound = host.enter(|| UdpSocket::bind(addr).ok());
        bound.is_some()
    });
    bound.expect("bound")
}

/// A sender's socket.
pub(crate) struct Proxy {
    pub(crate) socket: UdpSocket,
}

impl Proxy {
    /// A socket of the host's that talks to the relay.
    pub(crate) fn new(host: &Host, relay: SocketAddr) -> Self {
        let any: IpAddr = match relay {
            SocketAddr::V4(_) => [0, 0, 0, 0].into(),
            SocketAddr::V6(_) => [0; 16].into(),
        };
        Self::from(host, SocketAddr::new(any, 0), relay)
    }

    /// The same from this address.
    pub(crate) fn from(host: &Host, from: SocketAddr, relay: SocketAddr) -> Self {
        let socket = bind(host, from);
        // an answer from another address than the relay's would not arrive
        socket.connect(relay).expect("connect");
        let proxy = Self { socket };
        proxy.be_patient(SOON);
        proxy
    }

    /// Waits so long for an answer.
    pub(crate) fn be_patient(&self, limit: Duration) {
        let set = self.socket.set_read_timeout(Some(limit));
        set.expect("read timeout");
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.socket.local_addr().expect("address")
    }

    /// Sends parts as one datagram.
    pub(crate) fn send(&self, parts: &[&[u8]]) {
        self.socket.send(&parts.concat()).expect("send");
    }

    /// The next answer.
    pub(crate) fn answer(&self) -> Vec<u8> {
        let mut buffer = vec![0; 65_536];
        let length = self.socket.recv(&mut buffer).expect("an answer");
        buffer.truncate(length);
        buffer
    }

    /// Sends for a client with a header and fails unless the payload comes back.
    pub(crate) fn exchange(&self, client: &str, payload: &[u8]) {
        self.send(&[&announce(client), payload]);
        assert_eq!(self.answer(), payload, "for {client}");
    }

    /// Fails if there is an answer that was not asked for yet.
    pub(crate) fn assert_nothing_more(&self) {
        self.socket.set_nonblocking(true).expect("non-blocking");
        let received = self.socket.recv(&mut [0; 64]);
        self.socket.set_nonblocking(false).expect("blocking");
        assert!(received.is_err(), "another answer: {received:?}");
    }
}

/// A v2 header of a UDP client.
pub(crate) fn announce(client: &str) -> Vec<u8> {
    let client: SocketAddr = client.parse().expect("a client address");
    let destination = match client {
        SocketAddr::V4(_) => "198.51.100.1:53",
        SocketAddr::V6(_) => "[2001:db8:1::1]:53",
    };
    let destination = destination.parse().expect("an address");
    V2::proxied(client, destination, Transport::Datagram).finish()
}

/// An address.
pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// The UDP sockets of a host that are connected to this address, as `ss` shows them with their marks.
pub(crate) fn sockets_to(host: &Host, target: SocketAddr) -> String {
    let ip = match target.ip() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    host.run(&format!("ss -Hune dst {ip} and dport = :{}", target.port()))
}

/// Waits until so many sockets of a host are connected to this address.
///
/// Not at once: while another test of this process starts a program, the fork has a copy of every socket
/// until it has become that program, and a socket that is closed here stays for as long.
pub(crate) fn wait_sockets_to(host: &Host, target: SocketAddr, count: usize) {
    let now = || sockets_to(host, target);
    wait_for(&format!("{count} sockets:\n{}", now()), || {
        now().lines().count() == count
    });
}
