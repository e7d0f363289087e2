//! A proxy's host, a relay's host, services that record their peers, and proxies that announce clients.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use mmproxyctl::model::{
    AllowList, ListenAddr, Mark, NamedTargets, PortPolicy, TargetAddr, parse_prefix,
};
use mmproxyctl::relay::counters::{Refusal, Totals};
use mmproxyctl::relay::header::{encode_v1, encode_v2};
use mmproxyctl::relay::settings::Settings;
use mmproxyctl::relay::tcp::Server;
use mmproxyctl::relay::workers::{IoUring, Workers};
use mmproxyctl::socket;
use socket2::SockRef;

use crate::support::net::{Host, wait_for};

/// The mark of the pathway in these tests.
pub(crate) const MARK: u32 = 123;
/// How long anything may take that happens at once unless something is wrong.
pub(crate) const SOON: Duration = Duration::from_secs(10);

/// Two hosts with a link between them; a pathway for loopback targets on the relay's.
pub(crate) struct Lab {
    /// Where relay and services run: 10.0.0.1, fd00::1.
    pub(crate) wks: Host,
    /// Where proxies run: 10.0.0.2, fd00::2.
    pub(crate) vps: Host,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let lab = Self::without_pathway();
        install_pathway(&lab.wks, MARK);
        lab
    }

    /// Nobody answers a spoofed client yet.
    pub(crate) fn without_pathway() -> Self {
        let (wks, vps) = (Host::new("wks01"), Host::new("vps01"));
        wks.link(
            "eth0",
            &["10.0.0.1/24", "fd00::1/64"],
            &vps,
            "eth0",
            &["10.0.0.2/24", "fd00::2/64"],
        );
        Self { wks, vps }
    }

    /// A TCP connection of the proxy to the relay.
    pub(crate) fn dial(&self, relay: SocketAddr) -> TcpStream {
        self.try_dial(relay).expect("connect to the relay")
    }

    fn try_dial(&self, relay: SocketAddr) -> std::io::Result<TcpStream> {
        let stream = self
            .vps
            .enter(|| TcpStream::connect_timeout(&relay, SOON))?;
        patient(&stream);
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Fails unless the relay closes a connection that begins with these bytes, without a byte back.
    pub(crate) fn assert_refused(&self, relay: &Relay, bytes: &[u8], what: &str) {
        // a reset can be there before connect() returns
        match self.try_dial(relay.addr) {
            Ok(mut stream) => {
                let _ = stream.write_all(bytes);
                assert_closed(&mut stream, what);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{what}: {error}"),
        }
    }

    /// A connection that announces a client with a v2 header.
    pub(crate) fn connect(&self, relay: &Relay, client: &str) -> TcpStream {
        let mut stream = self.dial(relay.addr);
        stream
            .write_all(&announce(client))
            .expect("send the header");
        stream
    }
}

/// The return road for loopback targets as `ip` makes it, independent of the program under test.
pub(crate) fn install_pathway(host: &Host, mark: u32) {
    host.ip(&format!(
        "rule add priority 100 from 127.0.0.0/8 fwmark {mark}/0xff iif lo lookup {mark}"
    ));
    host.ip(&format!(
        "rule add priority 200 from 127.0.0.0/8 iif lo lookup {mark}"
    ));
    host.ip(&format!("route add local default dev lo table {mark}"));
    host.ip(&format!(
        "-6 rule add priority 100 from ::1 fwmark {mark}/0xff iif lo lookup {mark}"
    ));
    host.ip(&format!(
        "-6 rule add priority 200 from ::1 iif lo lookup {mark}"
    ));
    host.ip(&format!("-6 route add local default dev lo table {mark}"));
}

/// Sets time limits so that a test fails rather than hangs.
fn patient(stream: &TcpStream) {
    stream.set_read_timeout(Some(SOON)).expect("read timeout");
    stream.set_write_timeout(Some(SOON)).expect("write timeout");
}

/// A v2 header that announces this client.
pub(crate) fn announce(client: &str) -> Vec<u8> {
    let client: SocketAddr = client.parse().expect("a client address");
    encode_v2(client, destination_for(client))
}

/// A v1 header that announces this client.
pub(crate) fn announce_v1(client: &str) -> Vec<u8> {
    let client: SocketAddr = client.parse().expect("a client address");
    encode_v1(client, destination_for(client))
}

fn destination_for(client: SocketAddr) -> SocketAddr {
    match client {
        SocketAddr::V4(_) => ([198, 51, 100, 1], 443).into(),
        SocketAddr::V6(_) => "[2001:db8:1::1]:443".parse().expect("an address"),
    }
}

/// A running relay with its listen address.
pub(crate) struct Relay {
    pub(crate) server: Server,
    pub(crate) addr: SocketAddr,
    workers: Option<Workers>,
}

impl Relay {
    /// A relay on 10.0.0.1 with one worker thread.
    pub(crate) fn start(host: &Host, settings: Settings) -> Self {
        Self::start_at(host, "10.0.0.1:0", 1, settings)
    }

    /// A relay at an address with so many worker threads.
    pub(crate) fn start_at(host: &Host, listen: &str, workers: usize, settings: Settings) -> Self {
        Self::start_as(host, listen, workers, settings, IoUring::default())
    }

    /// A relay on 10.0.0.1 with one worker thread, with io_uring or without.
    pub(crate) fn start_with(host: &Host, settings: Settings, io_uring: IoUring) -> Self {
        Self::start_as(host, "10.0.0.1:0", 1, settings, io_uring)
    }

    fn start_as(
        host: &Host,
        listen: &str,
        workers: usize,
        settings: Settings,
        io_uring: IoUring,
    ) -> Self {
        let listen = ListenAddr::new(listen.parse().expect("a listen address"));
        let workers = NonZeroUsize::new(workers).expect("workers");
        host.enter(|| {
            let listeners = socket::tcp_listeners(listen, workers).expect("listen");
            let addr = listeners.sockets[0].local_addr().expect("address");
            let workers = Workers::start_with(workers, io_uring).expect("worker threads");
            let server = Server::start(&workers, listeners.sockets, settings).expect("start");
            let workers = Some(workers);
            Self {
                server,
                addr,
                workers,
            }
        })
    }

    /// Ends the worker threads, and with them whatever is open.
    pub(crate) fn end(&mut self) {
        self.workers = None;
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

    /// Waits until this kind of refusal was counted so often.
    pub(crate) fn wait_refused(&self, kind: Refusal, times: u64) {
        self.wait(kind.name(), |totals| totals.refused.of(kind) == times);
    }
}

/// Settings of a relay to these targets that allows everyone.
pub(crate) fn settings(targets: &[SocketAddr]) -> Settings {
    let target = |v6: bool| {
        let addr = targets.iter().find(|addr| addr.is_ipv6() == v6);
        addr.copied().map(TargetAddr::new)
    };
    Settings {
        name: "test".parse().expect("a name"),
        mark: Mark::new(MARK),
        parallel: None,
        intercepted: None,
        destinations: None,
        named: NamedTargets::default(),
        target4: target(false),
        target6: target(true),
        allow: allow(&["0.0.0.0/0", "::/0"]),
        header_timeout: SOON,
        connect_timeout: SOON,
        idle_timeout: None,
        port: PortPolicy::Keep,
        max_connections: None,
        max_waiting: NonZeroU32::new(1000).expect("a number"),
    }
}

/// An allow list.
pub(crate) fn allow(prefixes: &[&str]) -> Arc<AllowList> {
    let prefixes = prefixes
        .iter()
        .map(|text| parse_prefix(text).expect("a prefix"));
    Arc::new(AllowList::new(prefixes).expect("not empty"))
}

/// A TCP service; each connection gets a thread.
pub(crate) struct Service {
    pub(crate) addr: SocketAddr,
    listener: TcpListener,
    peers: Receiver<SocketAddr>,
    acceptor: Option<JoinHandle<()>>,
}

impl Service {
    /// A service at an address (port 0: any) that does this with each connection.
    pub(crate) fn start(
        host: &Host,
        addr: &str,
        work: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> Self {
        let listener = host.enter(|| TcpListener::bind(addr)).expect("bind");
        // std's 128 waiting connections are fewer than some tests make at once
        SockRef::from(&listener).listen(4096).expect("listen");
        let accepting = listener.try_clone().expect("clone");
        let (seen, peers) = channel();
        let work = Arc::new(work);
        let acceptor = std::thread::spawn(move || {
            while let Ok((stream, peer)) = accepting.accept() {
                patient(&stream);
                let _ = seen.send(peer);
                let work = Arc::clone(&work);
                std::thread::spawn(move || work(stream));
            }
        });
        Self {
            addr: listener.local_addr().expect("address"),
            listener,
            peers,
            acceptor: Some(acceptor),
        }
    }

    /// A service that sends back what it gets, and closes when the other side does.
    pub(crate) fn echo(host: &Host, addr: &str) -> Self {
        Self::start(host, addr, |mut stream| {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..length]).is_err() {
                    break;
                }
            }
        })
    }

    /// Fixes the receive buffer of the connections to come.
    pub(crate) fn receive_buffer(&self, bytes: usize) {
        SockRef::from(&self.listener)
            .set_recv_buffer_size(bytes)
            .expect("SO_RCVBUF");
    }

    /// Whom the service saw next.
    pub(crate) fn peer(&self) -> SocketAddr {
        self.peers
            .recv_timeout(SOON)
            .expect("a connection at the service")
    }

    /// Fails if anybody but this client ever came: lets the client through and looks who was first.
    pub(crate) fn assert_only(&self, lab: &Lab, relay: &Relay, client: &str) {
        let mut stream = lab.connect(relay, client);
        exchange(&mut stream, b"still there?");
        assert_eq!(self.peer(), client.parse().expect("an address"));
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // wakes accept() with an error
        let _ = SockRef::from(&self.listener).shutdown(std::net::Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Sends a request to an echo service and checks the answer.
pub(crate) fn exchange(stream: &mut TcpStream, request: &[u8]) {
    stream.write_all(request).expect("send");
    let mut answer = vec![0; request.len()];
    stream.read_exact(&mut answer).expect("receive");
    assert_eq!(answer, request);
}

/// Makes the close of this socket a reset.
pub(crate) fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .expect("SO_LINGER");
}

/// Fails unless the other side has closed or reset without another byte.
pub(crate) fn assert_closed(stream: &mut TcpStream, what: &str) {
    match stream.read(&mut [0; 64]) {
        Ok(0) => {}
        Ok(length) => panic!("{what}: {length} bytes came back"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{what}: {error}"),
    }
}

/// The sockets of a host that are connected to this address, as `ss` shows them with their marks.
pub(crate) fn sockets_to(host: &Host, target: SocketAddr) -> String {
    let ip = match target.ip() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    host.run(&format!("ss -Htne dst {ip} and dport = :{}", target.port()))
}
