//! Services behind a router whose other link is narrower: its ICMP is for the client's address and has the
//! connection's mark, as an answer has, but is from the router. TCP and UDP, both families.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use mmproxyctl::pathway::Firewall;
use socket2::{Domain, Protocol, Socket, Type};

use crate::pathway::{add, assert_same, ctl, interface, json, listing, pathway};
use crate::relay::lab::{SOON, announce};
use crate::support::net::{Host, Running, wait_for};

/// What the narrow link takes.
const MTU: u16 = 1300;
/// More than that with any headers, and less than what Ethernet takes.
const LARGE: usize = 1400;
/// By family: client and service.
const CELLS: [(&str, &str); 2] = [("203.0.113.7", "172.20.0.2"), ("2001:db8:7::7", "fd20::2")];
const PORT: u16 = 7000;
/// What is sent over TCP: more than one segment.
const SENT: usize = 100_000;
/// How long what vanishes is waited for.
const HOPELESS: Duration = Duration::from_millis(700);

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().expect("an address"), port)
}

/// wks01 with a router on its `lan`, and a host with services behind that.
pub(crate) struct Narrow {
    /// 10.0.0.1, fd00::1.
    pub(crate) wks: Host,
    /// Where proxies and clients are, and the world beyond: 10.0.0.2, fd00::2.
    pub(crate) vps: Host,
    _router: Host,
    /// 172.20.0.2, fd20::2.
    pub(crate) far: Host,
}

impl Narrow {
    pub(crate) fn new(firewall: Firewall) -> Self {
        let (wks, vps) = (Host::new("wks01").with(firewall), Host::new("vps01"));
        let (router, far) = (Host::new("router"), Host::new("far"));
        for ((one, at_one), (other, at_other), v4, v6) in [
            ((&wks, "eth0"), (&vps, "eth0"), "10.0.0", "fd00"),
            ((&wks, "lan"), (&router, "eth0"), "172.19.0", "fd19"),
            ((&router, "eth1"), (&far, "eth0"), "172.20.0", "fd20"),
        ] {
            let of = |number| [format!("{v4}.{number}/24"), format!("{v6}::{number}/64")];
            let ([ours4, ours6], [theirs4, theirs6]) = (of(1), of(2));
            one.link(
                at_one,
                &[&ours4, &ours6],
                other,
                at_other,
                &[&theirs4, &theirs6],
            );
        }
        for (host, interface) in [(&router, "eth1"), (&far, "eth0")] {
            host.ip(&format!("link set dev {interface} mtu {MTU}"));
        }
        for host in [&wks, &router] {
            host.sysctl("net.ipv4.ip_forward", "1");
            host.sysctl("net.ipv6.conf.all.forwarding", "1");
        }
        for (host, v4, v6) in [
            (&wks, "10.0.0.2", "fd00::2"),
            (&vps, "10.0.0.1", "fd00::1"),
            (&router, "172.19.0.1", "fd19::1"),
        ] {
            host.ip(&format!("route add default via {v4}"));
            host.ip(&format!("-6 route add default via {v6}"));
        }
        // a service that knows nothing of its narrow link: else TCP would not send more than it takes
        far.ip("route add default via 172.20.0.1 advmss 1460");
        far.ip("-6 route add default via fd20::1 advmss 1440");
        wks.ip("route add 172.20.0.0/24 via 172.19.0.2");
        wks.ip("-6 route add fd20::/64 via fd19::2");
        wks.write("etc/pathways.conf", "123\n");
        wks.write(
            "etc/instances.tsv",
            format!(
                "tcp\t123\t10.0.0.1:2222\t172.20.0.2\t{PORT}\tfd20::2\n\
                 udp\t123\t10.0.0.1:2222\t172.20.0.2\t{PORT}\tfd20::2\tprotocol=udp\n"
            ),
        );
        wks.write("etc/allow.txt", "10.0.0.2\n");
        Self {
            wks,
            vps,
            _router: router,
            far,
        }
    }

    pub(crate) fn add(&self) {
        let (code, out, err) = ctl(&self.wks, "pathway add --all");
        assert_eq!(code, 0, "{out}{err}");
    }

    /// Without what routers taught it of the paths.
    fn forget(&self) {
        self.wks.ip("route flush cache");
        self.wks.ip("-6 route flush cache");
    }

    fn run(&self) -> Running {
        let running = self.wks.spawn(self.wks.mmproxyctl("run --all"));
        running.wait_log("INFO ready");
        running
    }

    /// A socket of wks01 with the pathway's mark that stands for a client.
    fn spoofed(&self, client: SocketAddr, service: SocketAddr) -> UdpSocket {
        self.wks.enter(|| {
            let socket = Socket::new(
                Domain::for_address(client),
                Type::DGRAM,
                Some(Protocol::UDP),
            );
            let socket = socket.expect("a socket");
            match client {
                SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
                SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
            }
            .and_then(|()| socket.set_mark(123))
            .and_then(|()| socket.bind(&client.into()))
            .and_then(|()| socket.connect(&service.into()))
            .expect("a spoofed socket");
            let socket = UdpSocket::from(socket);
            socket.set_read_timeout(Some(SOON)).expect("a timeout");
            socket
        })
    }
}

/// A TCP service that says how much it got of each connection.
fn counting(host: &Host, at: SocketAddr) {
    let listener = host.enter(|| TcpListener::bind(at).expect("listen"));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("accept");
            std::thread::spawn(move || {
                let mut got = Vec::new();
                let _ = stream.read_to_end(&mut got);
                let peer = stream.peer_addr().expect("a peer");
                let _ = write!(stream, "{} from {peer}", got.len());
            });
        }
    });
}

/// Bytes through the relay, from this client; what the service said of them within `patience`.
fn upload(lab: &Narrow, client: SocketAddr, patience: Duration) -> std::io::Result<String> {
    let relay = at("10.0.0.1", 2222);
    let mut stream = lab.vps.enter(|| TcpStream::connect_timeout(&relay, SOON))?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(&announce(&client.to_string()))?;
    stream.write_all(&[7; SENT])?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[track_caller]
fn assert_arrives(lab: &Narrow, (client, service): (&str, &str), port: u16, when: &str) {
    let client = at(client, port);
    let answer = upload(lab, client, SOON);
    let answer = answer.unwrap_or_else(|error| panic!("{when}, {client} to {service}: {error}"));
    assert_eq!(answer, format!("{SENT} from {client}"), "{when}");
}

#[track_caller]
fn assert_vanishes(lab: &Narrow, (client, service): (&str, &str), port: u16, when: &str) {
    let error = upload(lab, at(client, port), HOPELESS).expect_err(when);
    let kind = error.kind();
    assert_eq!(kind, ErrorKind::WouldBlock, "{when}, {service}: {error}");
}

/// The rules for routers' ICMP of a family.
fn icmp_rules(host: &Host, family: &str) -> Vec<String> {
    let rules = host.ip(&format!("{family} rule"));
    let rules = rules.lines().filter(|line| line.contains("ipproto"));
    rules.map(|line| line.replace('\t', " ")).collect()
}

/// What older versions put in place, and what `pathway add` makes of it: just what is missing.
fn large_ones_arrive(firewall: Firewall) {
    let lab = Narrow::new(firewall);
    let before = listing(&lab.wks);
    lab.add();
    for (family, icmp) in [("-4", "icmp"), ("-6", "ipv6-icmp")] {
        let of = "from all fwmark 0x7b/0xff";
        assert_eq!(
            icmp_rules(&lab.wks, family),
            [
                format!("101: {of} iif lo ipproto {icmp} goto 103 proto 177"),
                format!("102: {of} ipproto {icmp} lookup 123 proto 177"),
                format!("103: {of} iif lo ipproto {icmp} nop proto 177"),
            ]
        );
        for priority in [101, 102, 103] {
            lab.wks
                .ip(&format!("{family} rule del priority {priority}"));
        }
    }
    // it may have been upgraded before its pathways: that is no reason not to start
    let relay = lab.run();
    let warned = "without the rules for routers' ICMP";
    assert!(relay.log().contains(warned), "{}", relay.log());
    for cell in CELLS {
        counting(&lab.far, at(cell.1, PORT));
        assert_vanishes(&lab, cell, 4000, "without the rules");
    }
    let (code, out, _) = ctl(&lab.wks, "pathway check");
    assert_eq!(code, 1, "{out}");
    let missing = "IPv6 rule missing: priority 102 fwmark 0x7b/0xff ipproto ipv6-icmp lookup 123";
    assert!(out.contains(missing), "{out}");
    let report = json(&lab.wks, "pathway add 123 --json");
    let changes = report.to_string().matches("rule add priority 10").count();
    assert_eq!(changes, 6, "{report:#}");
    for cell in CELLS {
        assert_arrives(&lab, cell, 4001, "upgraded");
    }
    assert_eq!(ctl(&lab.wks, "pathway check").0, 0);
    assert_eq!(ctl(&lab.wks, "pathway del 123").0, 0);
    assert_same(&listing(&lab.wks), &before, "after del");
}

/// What a rule without the jump would catch as well.
const TOO_MUCH: [&str; 2] = [
    "rule add priority 50 fwmark 123/0xff ipproto icmp lookup 123",
    "-6 rule add priority 50 fwmark 123/0xff ipproto ipv6-icmp lookup 123",
];

/// Whether the way back to the router leads to where its ICMP came from is asked with the ICMP's mark.
fn the_way_back_is_checked_with_the_mark(firewall: Firewall) {
    let lab = Narrow::new(firewall);
    lab.add();
    for (switch, value) in [("src_valid_mark", "1"), ("rp_filter", "1")] {
        let name = format!("net.ipv4.conf.all.{switch}");
        lab.wks.sysctl(&name, value);
    }
    // as firewalld has it
    lab.wks.run("nft add table inet check");
    lab.wks
        .run("nft add chain inet check pre { type filter hook prerouting priority -140 ; }");
    lab.wks.run(
        "nft add rule inet check pre meta nfproto ipv6 fib saddr . mark . iif oif missing drop",
    );
    let _relay = lab.run();
    for (cell, rule) in CELLS.into_iter().zip(TOO_MUCH) {
        counting(&lab.far, at(cell.1, PORT));
        lab.wks.ip(rule);
        assert_vanishes(&lab, cell, 4000, "with a rule that catches the look-up");
        lab.wks.ip(&rule.replace(" add ", " del "));
        lab.forget();
        assert_arrives(&lab, cell, 4001, "as pathway add makes it");
    }
}

/// What this host itself says to a service: nobody listens any more for its answers. IPv6 only: over IPv4 the
/// kernel says nothing in the name of an address that is not its own.
fn own_icmp_reaches_the_service(firewall: Firewall) {
    let lab = Narrow::new(firewall);
    lab.add();
    let [_, (client, service)] = CELLS;
    let service = at(service, PORT);
    let told = |port: u16| {
        let client = at(client, port);
        let far = lab.far.enter(|| UdpSocket::bind(service).expect("bind"));
        let near = lab.spoofed(client, service);
        near.send(b"question").expect("send");
        far.set_read_timeout(Some(SOON)).expect("a timeout");
        let mut buffer = [0; 9];
        let (_, peer) = far.recv_from(&mut buffer).expect("the question");
        assert_eq!(peer, client);
        far.connect(peer).expect("connect");
        far.send(b"answer").expect("send");
        near.recv(&mut buffer).expect("the answer");
        drop(near);
        far.send(b"too late").expect("send");
        far.set_read_timeout(Some(HOPELESS)).expect("a timeout");
        far.recv(&mut buffer).expect_err("no answer").kind()
    };
    assert_eq!(told(4000), ErrorKind::ConnectionRefused);
    lab.wks.ip(TOO_MUCH[1]);
    assert_eq!(told(4001), ErrorKind::WouldBlock, "with too much caught");
}

/// Pings, and direct clients of the same service: none of that has the mark.
fn others_icmp_is_theirs(firewall: Firewall) {
    let lab = Narrow::new(firewall);
    lab.add();
    for (client, service) in CELLS {
        lab.vps.address("lo", client);
        // a relayed flow of the same client
        let flow = lab.spoofed(at(client, 4000), at(service, PORT));
        flow.send(b"relayed").expect("send");
        lab.far.run(&format!("busybox ping -c 1 -W 2 {client}"));
        lab.vps
            .run(&format!("busybox ping -c 1 -W 2 -I {client} {service}"));
        let direct = lab
            .vps
            .enter(|| UdpSocket::bind(at(client, 5000)).expect("bind"));
        let show = format!("route get {service} from {client}");
        wait_for(&format!("{client} to be told what fits"), || {
            // refused once the path is known to be too narrow, or the port to be closed
            let _ = direct.send_to(&[7; LARGE], at(service, PORT));
            lab.vps.ip(&show).contains(&format!("mtu {MTU}"))
        });
    }
}

/// Rules are for routers between this host and a target.
#[test]
fn only_where_there_may_be_routers() {
    let host = Host::new("wks01");
    interface(&host, &["10.0.0.2/24", "fd00::2/64"]);
    for (targets, v4, v6) in [
        (&[][..], 0, 0),
        (&["10.0.0.2", "fd00::2"], 0, 0),
        (&["10.0.0.2", "fd00::3"], 0, 3),
        (&["10.0.0.0/24", "fd00::2"], 3, 0),
    ] {
        let wanted = [pathway(123, targets)];
        add(&host, &wanted);
        let found = ["-4", "-6"].map(|family| icmp_rules(&host, family).len());
        assert_eq!(found, [v4, v6], "{targets:?}");
        assert_eq!(add(&host, &wanted).changes, [], "{targets:?}");
    }
}

/// The same tests over both back ends.
macro_rules! over_both {
    ($($test:ident),* $(,)?) => {
        mod iptables {
            $(#[test] fn $test() { super::$test(mmproxyctl::pathway::Firewall::Iptables) })*
        }
        mod nftables {
            $(#[test] fn $test() { super::$test(mmproxyctl::pathway::Firewall::Nftables) })*
        }
    };
}

over_both!(
    large_ones_arrive,
    the_way_back_is_checked_with_the_mark,
    own_icmp_reaches_the_service,
    others_icmp_is_theirs,
);
