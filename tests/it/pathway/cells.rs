//! The truth table: which connections a pathway carries, on which kind of host. TCP, without a relay:
//! the test itself makes the spoofed, marked connection.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use mmproxyctl::model::{Pathway, Priority, TableId};
use mmproxyctl::pathway::Firewall;
use socket2::{Domain, Protocol, Socket, Type};

use super::{add, del, pathway};
use crate::support::net::{Host, wait_for};

over_both!(
    every_cell_works_on_every_kind_of_host,
    no_cell_works_without_the_pathway,
    direct_clients_that_are_sent_to_loopback_are_unaffected,
    established_connections_survive_every_change,
);

/// How long a connect may take that shall work, and one that shall not.
pub(crate) const LIMIT: Duration = Duration::from_secs(3);
pub(crate) const HOPELESS: Duration = Duration::from_millis(300);

const PORT: u16 = 2222;
pub(crate) const MARK: u32 = 123;

/// Clients from far away, and the neighbour on the LAN.
pub(crate) const CLIENTS: [&str; 4] = ["198.51.100.7", "2001:db8:7::7", "10.0.0.1", "fd00::1"];

/// wks01 with a LAN, a container behind a bridge, and a host whose gateway it is.
pub(crate) struct Lab {
    pub(crate) wks: Host,
    pub(crate) lan: Host,
    pub(crate) services: Vec<(&'static str, TcpListener)>,
    _others: [Host; 2],
}

impl Lab {
    pub(crate) fn new(firewall: Firewall) -> Self {
        let (wks, lan) = (Host::new("wks01").with(firewall), Host::new("lan"));
        let (container, routed) = (Host::new("container"), Host::new("routed"));
        wks.link(
            "eth0",
            &["10.0.0.2/24", "fd00::2/64"],
            &lan,
            "eth0",
            &["10.0.0.1/24", "fd00::1/64"],
        );
        wks.link(
            "eth1",
            &["10.9.0.1/24", "fd00:9::1/64"],
            &routed,
            "eth0",
            &["10.9.0.2/24", "fd00:9::2/64"],
        );
        wks.link(
            "veth0",
            &[],
            &container,
            "eth0",
            &["172.20.0.2/24", "fd00:20::2/64"],
        );
        wks.ip("link add br0 type bridge");
        wks.ip("link set veth0 master br0");
        wks.address("br0", "172.20.0.1/24");
        wks.address("br0", "fd00:20::1/64");
        wks.ip("link set br0 up");
        container.ip("route add default via 172.20.0.1");
        container.ip("-6 route add default via fd00:20::1");
        routed.ip("route add default via 10.9.0.1");
        routed.ip("-6 route add default via fd00:9::1");
        lan.ip("route add default via 10.0.0.2");
        lan.ip("-6 route add default via fd00::2");
        let mut services = Vec::new();
        for (host, addresses) in [
            (&wks, &["127.0.0.1", "::1", "10.0.0.2", "fd00::2"][..]),
            (&container, &["172.20.0.2", "fd00:20::2"]),
            (&routed, &["10.9.0.2", "fd00:9::2"]),
        ] {
            for &address in addresses {
                let listener = host.enter(|| TcpListener::bind(at(address, PORT)).unwrap());
                services.push((address, listener));
            }
        }
        Self {
            wks,
            lan,
            services,
            _others: [container, routed],
        }
    }

    pub(crate) fn default_route(&self, wanted: bool) {
        let verb = if wanted { "replace" } else { "del" };
        for (ip, via) in [("", "10.0.0.1"), ("-6", "fd00::1")] {
            let words = format!("ip {ip} route {verb} default via {via}");
            // `del` of a route that is not there
            let output = self.wks.try_run(&words);
            assert!(output.status.success() || !wanted, "{words}");
        }
    }

    pub(crate) fn sysctls(&self, name: &str, value: &str) {
        for interface in ["all", "lo", "eth0", "eth1", "br0"] {
            self.wks
                .sysctl(&format!("net.ipv4.conf.{interface}.{name}"), value);
        }
    }

    /// Every pair of client and service of one family that fails, with `limit` for each. Services in
    /// parallel.
    pub(crate) fn failures(&self, clients: &[&'static str], limit: Duration) -> Vec<String> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .services
                .iter()
                .map(|(service, listener)| {
                    scope.spawn(move || {
                        let same_family = clients
                            .iter()
                            .filter(|client| client.contains(':') == service.contains(':'));
                        same_family
                            .filter_map(|client| {
                                let error = self.cell(client, service, listener, limit).err()?;
                                Some(format!("{client} to {service}: {error}"))
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().expect("a cell's thread"))
                .collect()
        })
    }

    fn cell(
        &self,
        client: &str,
        service: &str,
        listener: &TcpListener,
        limit: Duration,
    ) -> std::io::Result<()> {
        let (mut near, expected) = self.spoofed(client, service, limit)?;
        let mut far = accept(listener, expected);
        exchange(&mut near, &mut far)?;
        // gone at once on both ends: the next round may use the tuple again
        for stream in [near, far] {
            Socket::from(stream).set_linger(Some(Duration::ZERO))?;
        }
        Ok(())
    }

    /// A connection of wks01 that the service must take for the client's, and the client's address.
    pub(crate) fn spoofed(
        &self,
        client: &str,
        service: &str,
        limit: Duration,
    ) -> std::io::Result<(TcpStream, SocketAddr)> {
        self.marked(MARK, client, service, limit)
    }

    /// The same on the pathway of any mark.
    pub(super) fn marked(
        &self,
        mark: u32,
        client: &str,
        service: &str,
        limit: Duration,
    ) -> std::io::Result<(TcpStream, SocketAddr)> {
        static NEXT: AtomicU16 = AtomicU16::new(20_000);
        let client = at(client, NEXT.fetch_add(1, Ordering::Relaxed));
        self.wks.enter(|| {
            let socket = Socket::new(
                Domain::for_address(client),
                Type::STREAM,
                Some(Protocol::TCP),
            )?;
            if client.is_ipv4() {
                socket.set_ip_transparent_v4(true)?;
            } else {
                socket.set_ip_transparent_v6(true)?;
            }
            socket.set_mark(mark)?;
            socket.bind(&client.into())?;
            socket.connect_timeout(&at(service, PORT).into(), limit)?;
            let stream = TcpStream::from(socket);
            stream.set_read_timeout(Some(limit))?;
            Ok((stream, client))
        })
    }

    /// A relayed connection from far away to each service.
    pub(crate) fn connections(&self) -> Vec<(&'static str, TcpStream, TcpStream)> {
        let mut connections = Vec::new();
        for client in &CLIENTS[..2] {
            for (service, listener) in &self.services {
                if client.contains(':') != service.contains(':') {
                    continue;
                }
                let (near, expected) = self.spoofed(client, service, LIMIT).unwrap();
                let far = accept(listener, expected);
                connections.push((*service, near, far));
            }
        }
        connections
    }

    /// Counts, and drops, replies that leave by the default route: in a gap they do, and the host there
    /// would reset the connection.
    pub(crate) fn count_leaks(&self) {
        for (iptables, client) in [("iptables", CLIENTS[0]), ("ip6tables", CLIENTS[1])] {
            self.lan.run(&format!(
                "{iptables} -t raw -A PREROUTING -d {client} -p tcp -j DROP"
            ));
        }
    }

    /// How many replies left, by family.
    pub(crate) fn leaked(&self) -> [u64; 2] {
        ["iptables", "ip6tables"].map(|iptables| {
            let counted = self.lan.run(&format!("{iptables} -t raw -vxnL PREROUTING"));
            let line = counted.lines().nth(2).expect("the rule");
            let packets = line.split_whitespace().next().expect("a count");
            packets.parse().expect("a number")
        })
    }

    fn service(&self, address: &str) -> &TcpListener {
        let found = self.services.iter().find(|(known, _)| *known == address);
        &found.unwrap().1
    }

    pub(crate) fn pathway(&self) -> Pathway {
        let targets: Vec<_> = self
            .services
            .iter()
            .map(|(address, _)| *address)
            .filter(|address| !address.parse::<IpAddr>().unwrap().is_loopback())
            .collect();
        pathway(MARK, &targets)
    }

    /// Clients without a pathway: straight from the LAN to every service that it can reach.
    pub(crate) fn assert_direct(&self, case: &str) {
        for (address, listener) in &self.services {
            let service = at(address, PORT);
            if service.ip().is_loopback() {
                continue;
            }
            let near = self
                .lan
                .enter(|| TcpStream::connect_timeout(&service, LIMIT));
            let mut near =
                near.unwrap_or_else(|error| panic!("{case}: direct to {address}: {error}"));
            near.set_read_timeout(Some(LIMIT)).unwrap();
            let mut far = accept(listener, near.local_addr().unwrap());
            exchange(&mut near, &mut far)
                .unwrap_or_else(|error| panic!("{case}: {address}: {error}"));
        }
    }
}

/// Does something while every connection exchanges bytes all the time, and once more afterwards.
pub(crate) fn under_traffic(
    connections: &mut [(&'static str, TcpStream, TcpStream)],
    work: impl FnOnce(),
) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (service, near, far) in connections.iter_mut() {
            let done = &done;
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    exchange(near, far).unwrap_or_else(|error| panic!("{service}: {error}"));
                    // leave the run that is being watched a processor
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
        }
        // also when the work panics, or the scope waits for ever
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    for (service, near, far) in connections {
        exchange(near, far).unwrap_or_else(|error| panic!("{service}: {error}"));
    }
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// The connection from this client; one that an earlier, failed attempt left in the queue is dropped.
pub(crate) fn accept(listener: &TcpListener, client: SocketAddr) -> TcpStream {
    listener.set_nonblocking(true).expect("set non-blocking");
    let mut found = None;
    wait_for(&format!("{client} in the listener's queue"), || {
        found = listener
            .accept()
            .ok()
            .and_then(|(stream, peer)| (peer == client).then_some(stream));
        found.is_some()
    });
    let stream = found.expect("waited for");
    stream.set_nonblocking(false).expect("set blocking");
    stream.set_read_timeout(Some(LIMIT)).expect("set time-out");
    stream
}

/// A byte each way.
pub(crate) fn exchange(near: &mut TcpStream, far: &mut TcpStream) -> std::io::Result<()> {
    let mut byte = [0];
    near.write_all(b"?")?;
    far.read_exact(&mut byte)?;
    far.write_all(b"!")?;
    near.read_exact(&mut byte)?;
    assert_eq!(&byte, b"!");
    Ok(())
}

/// route_localnet as somebody else may have set it.
const ROUTE_LOCALNET: [Option<&str>; 4] = [None, Some("lo"), Some("eth0"), Some("all")];

fn every_cell_works_on_every_kind_of_host(firewall: Firewall) {
    let lab = Lab::new(firewall);
    lab.wks.sysctl("net.ipv4.ip_forward", "1");
    lab.wks.sysctl("net.ipv6.conf.all.forwarding", "1");
    let pathway = [lab.pathway()];
    for default_route in [true, false] {
        lab.default_route(default_route);
        for localnet in ROUTE_LOCALNET {
            lab.sysctls("route_localnet", "0");
            if let Some(interface) = localnet {
                lab.wks
                    .sysctl(&format!("net.ipv4.conf.{interface}.route_localnet"), "1");
            }
            add(&lab.wks, &pathway);
            for rp_filter in ["0", "1", "2"] {
                lab.sysctls("rp_filter", rp_filter);
                let case = format!(
                    "default route {default_route}, route_localnet {localnet:?}, rp_filter {rp_filter}"
                );
                assert_eq!(lab.failures(&CLIENTS, LIMIT), [""; 0], "{case}");
                lab.assert_direct(&case);
            }
        }
    }
    // a forwarding host is no condition
    lab.wks.sysctl("net.ipv4.ip_forward", "0");
    lab.wks.sysctl("net.ipv6.conf.all.forwarding", "0");
    assert_eq!(lab.failures(&CLIENTS, LIMIT), [""; 0], "without forwarding");
}

fn no_cell_works_without_the_pathway(firewall: Firewall) {
    let lab = Lab::new(firewall);
    lab.default_route(true);
    let far_away = &CLIENTS[..2];
    assert_eq!(lab.failures(far_away, HOPELESS).len(), 8);
    let pathway = [lab.pathway()];
    add(&lab.wks, &pathway);
    assert_eq!(lab.failures(far_away, LIMIT), [""; 0]);
    del(&lab.wks, &pathway);
    assert_eq!(lab.failures(far_away, HOPELESS).len(), 8);
    // each kind of target needs its own rule
    add(&lab.wks, &[super::pathway(MARK, &[])]);
    let failed = lab.failures(far_away, HOPELESS);
    assert_eq!(failed.len(), 6, "{failed:?}");
    assert!(
        !failed
            .iter()
            .any(|cell| cell.contains("127.0.0.1") || cell.contains("to ::1"))
    );
}

fn direct_clients_that_are_sent_to_loopback_are_unaffected(firewall: Firewall) {
    let lab = Lab::new(firewall);
    lab.default_route(true);
    lab.wks.sysctl("net.ipv4.conf.eth0.route_localnet", "1");
    lab.wks.run(&format!(
        "iptables -t nat -A PREROUTING -p tcp --dport 8080 -j DNAT --to-destination 127.0.0.1:{PORT}"
    ));
    let direct = || {
        let mut near = lab
            .lan
            .enter(|| TcpStream::connect_timeout(&at("10.0.0.2", 8080), HOPELESS))?;
        let mut far = accept(lab.service("127.0.0.1"), near.local_addr()?);
        exchange(&mut near, &mut far)
    };
    direct().unwrap();
    add(&lab.wks, &[lab.pathway()]);
    direct().unwrap();
    assert_eq!(lab.failures(&CLIENTS, LIMIT), [""; 0]);
    // what the unmarked rule would do to them
    lab.wks
        .ip("rule add priority 200 from 127.0.0.0/8 iif lo lookup 123");
    assert!(direct().is_err());
}

fn established_connections_survive_every_change(firewall: Firewall) {
    let lab = Lab::new(firewall);
    lab.default_route(true);
    super::foreign::old_scripts(&lab.wks, MARK);
    let base = lab.pathway();
    add(&lab.wks, std::slice::from_ref(&base));
    let mut connections = lab.connections();
    assert_eq!(connections.len(), 8);
    let with = |change: fn(&mut Pathway)| {
        let mut pathway = base.clone();
        change(&mut pathway);
        pathway
    };
    let variants = [
        (
            "priority",
            with(|pathway| pathway.priority = Priority::new(300).unwrap()),
        ),
        (
            "table",
            with(|pathway| pathway.table = TableId::new(1000).unwrap()),
        ),
        (
            "mask",
            with(|pathway| pathway.mask = "0xffff".parse().unwrap()),
        ),
        (
            "more targets",
            with(|pathway| {
                pathway
                    .targets
                    .extend(super::pathway(9, &["10.7.0.0/16"]).targets)
            }),
        ),
        ("back", base.clone()),
    ];
    lab.count_leaks();
    under_traffic(&mut connections, || {
        for _ in 0..5 {
            for (change, variant) in &variants {
                let report = add(&lab.wks, std::slice::from_ref(variant));
                assert!(report.changed(), "{change}");
            }
        }
    });
    assert_eq!(lab.leaked(), [0, 0]);
    // and without the pathway it would have been seen
    del(&lab.wks, &[base]);
    for (_, _, far) in &mut connections {
        far.write_all(b"!").expect("write");
    }
    wait_for("replies that leave by the default route", || {
        lab.leaked().iter().all(|packets| *packets > 0)
    });
}
