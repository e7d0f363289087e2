//! QUIC through `udp-header=first`: a real HTTP/3 client and server (aioquic), between them a sender that does
//! what Cloudflare Spectrum does. What counts is whom the server sees.
//!
//! With the soak, because aioquic comes from PyPI.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::cells::done;
use super::lab::announce;
use crate::chain::deployment::{CLIENT, Deployment, VPS01, VPS01_PRIVATE, WKS01_PRIVATE, shipped};
use crate::support::net::{Host, Running};

/// Python with aioquic, as `tests/run.sh --soak` installs it beside the build.
fn python() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("target");
    let python = target.join("aioquic/bin/python");
    assert!(
        python.exists(),
        "{} is missing: ./tests/run.sh --soak --setup-only installs aioquic there",
        python.display()
    );
    python
}

fn script(host: &Host, name: &str) -> std::process::Command {
    let mut command = host.command(python());
    command.arg(shipped(&format!("tests/it/udp/quic/{name}.py")));
    command
}

/// Which datagram says who the client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Header {
    /// One of its own before the client's first.
    Alone,
    /// The client's first.
    Prepended,
}

/// A sender in front of the relay: clients come to UDP port 443 of vps01, and each gets a port towards the
/// relay, on whose first datagram alone is the header.
struct Sender {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sender {
    fn start(host: &Host, public: &str, relay: SocketAddr, header: Header) -> Self {
        let public: IpAddr = public.parse().expect("an address");
        let private: IpAddr = VPS01_PRIVATE.parse().expect("an address");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let inside = host.clone();
        let listener = host.enter(|| UdpSocket::bind((public, 443)).expect("bind"));
        let tick = Some(Duration::from_millis(10));
        listener.set_read_timeout(tick).expect("time limit");
        let thread = std::thread::spawn(move || {
            let mut flows: HashMap<SocketAddr, UdpSocket> = HashMap::new();
            let mut buffer = [0; 2048];
            let mut flow_of = |client: SocketAddr| -> (UdpSocket, bool) {
                if let Some(socket) = flows.get(&client) {
                    return (socket.try_clone().expect("clone"), false);
                }
                let socket = inside.enter(|| UdpSocket::bind((private, 0)).expect("bind"));
                socket.connect(relay).expect("connect");
                let (answers, clients) = (
                    socket.try_clone().expect("clone"),
                    listener.try_clone().expect("clone"),
                );
                answers.set_read_timeout(tick).expect("time limit");
                let stopped = Arc::clone(&stopped);
                std::thread::spawn(move || {
                    let mut buffer = [0; 2048];
                    while !stopped.load(Ordering::Relaxed) {
                        if let Ok(length) = answers.recv(&mut buffer) {
                            let _ = clients.send_to(&buffer[..length], client);
                        }
                    }
                });
                flows.insert(client, socket.try_clone().expect("clone"));
                (socket, true)
            };
            while !stopped.load(Ordering::Relaxed) {
                let Ok((length, client)) = listener.recv_from(&mut buffer) else {
                    continue;
                };
                let datagram = &buffer[..length];
                let announced = announce(&client.to_string());
                let (socket, new) = flow_of(client);
                let _ = match (new, header) {
                    (false, _) => socket.send(datagram),
                    (true, Header::Prepended) => socket.send(&[&announced, datagram].concat()),
                    (true, Header::Alone) => {
                        let _ = socket.send(&announced);
                        socket.send(datagram)
                    }
                };
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn server(lab: &Deployment, certificate: &Path) -> Running {
    let mut command = script(&lab.wks01, "server");
    command.arg(certificate).args(["127.0.0.1", "::1"]);
    let running = lab.wks01.spawn(command);
    running.wait_log("serving");
    running
}

#[test]
fn http3_with_the_header_on_the_first_datagram() {
    const LARGE: usize = 3_000_000;
    for (header, family) in [(Header::Alone, 0), (Header::Prepended, 1)] {
        let lab = Deployment::new();
        let certificate = lab.wks01.dir().join("certificate.pem");
        let server = server(&lab, &certificate);
        let line = format!(
            "web\t123\t{WKS01_PRIVATE}:8443\t127.0.0.1\t443\t::1\tprotocol=udp,udp-header=first\n"
        );
        lab.wks01.write("etc/instances.tsv", line);
        done(&lab.wks01, "pathway add 123");
        let relay = lab.wks01.spawn(lab.wks01.mmproxyctl("run web"));
        relay.wait_log("relaying");
        let to_relay = SocketAddr::new(WKS01_PRIVATE.parse().expect("an address"), 8443);
        let _sender = Sender::start(&lab.vps01, VPS01[family], to_relay, header);
        // two at a time: each has a port of its own, and the service tells them apart by it
        let clients = [0, 1].map(|_| {
            let mut command = script(&lab.client, "client");
            command.arg(&certificate).args([VPS01[family], "443"]);
            command.args(["/who", &format!("/{LARGE}"), "/who"]);
            lab.client.spawn(command)
        });
        let mut ports = Vec::new();
        for mut client in clients {
            let status = client.wait(Duration::from_secs(60));
            let said = client.log();
            assert!(status.success(), "{header:?}: {said}\n{}", relay.log());
            let lines: Vec<&str> = said.lines().collect();
            assert_eq!(lines.len(), 3, "{said}");
            assert_eq!(lines[1].trim(), LARGE.to_string());
            assert_eq!(lines[0], lines[2], "a client keeps its port");
            let seen: Vec<&str> = lines[0].split(' ').skip(1).collect();
            assert_eq!(seen[0], CLIENT[family], "{said}");
            ports.push(seen[1].to_owned());
        }
        assert_ne!(ports[0], ports[1]);
        for port in &ports {
            server.wait_log(&format!("/who from {} port {port}", CLIENT[family]));
        }
    }
}
