//! `listen=transparent`: what is routed to this host for addresses that are not its own, handed over by
//! TPROXY rules that `pathway` makes and removes.

mod old;
mod own;
mod ports;
mod rules;
mod running;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use mmproxyctl::pathway::Firewall;

use crate::pathway::{assert_same, effects, finish, listing, programs};
use crate::relay::lab::{SOON, Service, announce};
use crate::support::net::{Host, Running, wait_for};
use crate::udp::lab as udp;

/// How long what must not arrive is waited for.
const A_WHILE: Duration = Duration::from_millis(300);

/// What the rules are written with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Iptables,
    Legacy,
    Nftables,
}

/// Three hosts: a proxy that routes 203.0.113.0/24 and 2001:db8:5::/64 to the relay's host, and a service's
/// host behind that.
struct Rig {
    /// 10.0.0.2, fd00::2.
    vps: Host,
    /// 10.0.0.1, fd00::1 and 10.1.0.1, fd01::1.
    wks: Host,
    /// 10.1.0.2, fd01::2.
    srv: Host,
    backend: Backend,
}

/// A way in: protocol, where the proxy connects to, the client.
type Cell = (&'static str, &'static str, &'static str);

/// Both families, both protocols; addresses and ports from the middle of what is listened on.
const CELLS: [Cell; 4] = [
    ("tcp", "203.0.113.77:10500", "198.51.100.7"),
    ("tcp", "[2001:db8:5::77]:10500", "2001:db8:7::7"),
    ("udp", "203.0.113.77:10500", "198.51.100.7"),
    ("udp", "[2001:db8:5::77]:10500", "2001:db8:7::7"),
];

/// What listens for them; the service is on the host behind.
const LINES: &str = "\
t4\t123\t203.0.113.0/24:10000-10999\t10.1.0.2\t7000\tfd01::2\tlisten=transparent
t6\t123\t[2001:db8:5::]/64:10000-10999\t10.1.0.2\t7000\tfd01::2\tlisten=transparent
u4\t123\t203.0.113.0/24:10000-10999\t10.1.0.2\t7000\tfd01::2\tlisten=transparent,protocol=udp
u6\t123\t[2001:db8:5::]/64:10000-10999\t10.1.0.2\t7000\tfd01::2\tlisten=transparent,protocol=udp
";

/// The services of [`LINES`].
struct Services {
    tcp: [Service; 2],
    udp: [udp::Service; 2],
}

impl Rig {
    fn new(backend: Backend) -> Self {
        let firewall = match backend {
            Backend::Nftables => Firewall::Nftables,
            Backend::Iptables | Backend::Legacy => Firewall::Iptables,
        };
        let (vps, wks, srv) = (
            Host::new("vps01"),
            Host::new("wks01").with(firewall),
            Host::new("srv01"),
        );
        wks.link(
            "eth0",
            &["10.0.0.1/24", "fd00::1/64"],
            &vps,
            "eth0",
            &["10.0.0.2/24", "fd00::2/64"],
        );
        wks.link(
            "eth1",
            &["10.1.0.1/24", "fd01::1/64"],
            &srv,
            "eth0",
            &["10.1.0.2/24", "fd01::2/64"],
        );
        vps.ip("route add 203.0.113.0/24 via 10.0.0.1");
        vps.ip("-6 route add 2001:db8:5::/64 via fd00::1");
        wks.ip("route add default via 10.0.0.2");
        wks.ip("-6 route add default via fd00::2");
        srv.ip("route add default via 10.1.0.1");
        srv.ip("-6 route add default via fd01::1");
        wks.sysctl("net.ipv4.ip_forward", "1");
        wks.sysctl("net.ipv6.conf.all.forwarding", "1");
        wks.write("etc/pathways.conf", "123\n");
        wks.write("etc/allow.txt", "10.0.0.2\nfd00::2\n");
        let rig = Self {
            vps,
            wks,
            srv,
            backend,
        };
        if backend == Backend::Legacy {
            const MULTI: &str = "/usr/sbin/xtables-legacy-multi";
            let names = ["iptables", "ip6tables"];
            let all = names.map(|name| ["", "-save", "-restore"].map(|end| format!("{name}{end}")));
            let links: Vec<_> = all.iter().flatten().map(|name| (&**name, MULTI)).collect();
            programs(&rig.wks.dir().join("bin"), &links);
        }
        rig
    }

    /// With these lines in instances.tsv.
    fn with(self, lines: &str) -> Self {
        self.wks.write("etc/instances.tsv", lines);
        self
    }

    fn services(&self) -> Services {
        let at = ["10.1.0.2:7000", "[fd01::2]:7000"];
        Services {
            tcp: at.map(|at| Service::echo(&self.srv, at)),
            udp: at.map(|at| udp::Service::echo(&self.srv, at)),
        }
    }

    fn command(&self, words: &str) -> Command {
        let mut command = self.wks.mmproxyctl(words);
        if self.backend == Backend::Legacy {
            command.env("PATH", self.wks.dir().join("bin"));
        }
        command
    }

    /// A verb's exit code and all it said.
    fn ctl(&self, words: &str) -> (i32, String) {
        let (code, out, err) = finish(self.command(words));
        (code, out + &err)
    }

    /// The same, panics unless it succeeds.
    fn said(&self, words: &str) -> String {
        let (code, said) = self.ctl(words);
        assert_eq!(code, 0, "{words}: {said}");
        said
    }

    /// A process that is ready.
    fn run(&self, words: &str) -> Running {
        let running = self.wks.spawn(self.command(words));
        wait_for("the relays to be ready", || {
            running.log().contains("INFO ready")
        });
        running
    }

    /// Everything of the kernel that rules could be in.
    fn listing(&self) -> String {
        let legacy = match self.backend {
            Backend::Legacy => ["iptables-legacy-save", "ip6tables-legacy-save"]
                .map(|save| without_comments(&self.wks.run(save)))
                .concat(),
            _ => String::new(),
        };
        listing(&self.wks) + &legacy
    }

    /// Takes one family's and protocol's TPROXY rule of ours away, as another program might.
    fn break_rule(&self, family: &str, protocol: &str) {
        if self.backend == Backend::Nftables {
            self.wks
                .run("nft flush chain inet mmproxy intercept-0x7b-0x20ff");
            return;
        }
        let program = match (family, self.backend) {
            ("4", Backend::Legacy) => "iptables-legacy",
            ("4", _) => "iptables-nft",
            (_, Backend::Legacy) => "ip6tables-legacy",
            (_, _) => "ip6tables-nft",
        };
        let lines = self.wks.run(&format!("{program} -t mangle -S PREROUTING"));
        let ours = |line: &&str| {
            line.contains("TPROXY") && line.contains("mmproxyctl") && line.contains(protocol)
        };
        let line = lines
            .lines()
            .find(ours)
            .unwrap_or_else(|| panic!("{lines}"));
        let delete = line.replacen("-A", "-D", 1).replace('"', "");
        self.wks.run(&format!("{program} -t mangle {delete}"));
    }

    /// The proxy's connection through the relay, or `None` where nothing comes of it.
    fn connect(&self, to: &str, client: &str) -> Option<TcpStream> {
        let to = addr(to);
        let mut stream = self
            .vps
            .enter(|| TcpStream::connect_timeout(&to, A_WHILE))
            .ok()?;
        stream.set_read_timeout(Some(SOON)).expect("read timeout");
        stream.write_all(&announce(client)).ok()?;
        says(&mut stream).then_some(stream)
    }

    /// Whether a datagram comes back, and then from where it was sent to.
    fn asks(&self, proxy: &UdpSocket, to: &str, client: &str, patience: Duration) -> bool {
        proxy.set_read_timeout(Some(patience)).expect("timeout");
        let datagram = [&announce(client)[..], b"hello"].concat();
        proxy.send_to(&datagram, addr(to)).expect("send");
        let mut answer = [0; 16];
        match proxy.recv_from(&mut answer) {
            Ok((length, from)) => {
                assert_eq!(&answer[..length], b"hello");
                assert_eq!(from, addr(to));
                true
            }
            Err(_) => false,
        }
    }

    fn proxy_socket(&self, to: &str) -> UdpSocket {
        let own = if addr(to).is_ipv4() {
            "10.0.0.2:0"
        } else {
            "[fd00::2]:0"
        };
        self.vps.enter(|| UdpSocket::bind(own)).expect("bind")
    }

    /// Whether a cell works; if so, the service has seen the client.
    fn passes(&self, services: &Services, (protocol, to, client): Cell) -> bool {
        // each time another port: a flow that is not over yet keeps its own
        static PORT: AtomicU16 = AtomicU16::new(4000);
        let ip: IpAddr = client.parse().expect("an address");
        let client = SocketAddr::new(ip, PORT.fetch_add(1, Ordering::Relaxed)).to_string();
        let (client, at) = (&*client, usize::from(ip.is_ipv6()));
        let passes = match protocol {
            "tcp" => self.connect(to, client).is_some(),
            _ => self.asks(&self.proxy_socket(to), to, client, A_WHILE),
        };
        if passes {
            let seen = || match protocol {
                "tcp" => services.tcp[at].peer(),
                _ => services.udp[at].next().peer,
            };
            // what the doctor asked the service itself comes before
            let doctors = ["10.1.0.1", "fd01::1", "192.0.2.", "2001:db8:ffff::"];
            let is_doctors = |seen: &SocketAddr| {
                let seen = seen.ip().to_string();
                doctors.iter().any(|doctor| seen.starts_with(doctor))
            };
            let seen = std::iter::repeat_with(seen).find(|seen| !is_doctors(seen));
            assert_eq!(seen, Some(addr(client)), "{protocol} {to}");
        }
        passes
    }

    fn assert_cells(&self, services: &Services, pass: bool, when: &str) {
        for cell in CELLS {
            let passes = self.passes(services, cell);
            assert_eq!(passes, pass, "{:?}: {cell:?}: {when}", self.backend);
        }
    }
}

/// Whether the other end of a relayed connection answers.
fn says(stream: &mut TcpStream) -> bool {
    let mut answer = [0; 5];
    stream.write_all(b"hello").is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && &answer == b"hello"
}

fn without_comments(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.split(" [").next().unwrap_or(line).to_owned() + "\n")
        .collect()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}
