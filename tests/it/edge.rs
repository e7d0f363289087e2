//! `edge-config`: what it prints is loaded into the real programs, and clients come through them.

mod parsed;

use std::net::TcpStream;

use crate::chain::deployment::{CLIENT, Deployment, VPS01, WKS01_PRIVATE};
use crate::relay::lab::{SOON, Service, exchange};
use crate::support::net::{Host, Running};
use crate::udp::dns::unbound;

/// The service's port, which is also the one that the proxy serves the public on.
const PORT: u16 = 7000;

/// A deployment with one instance, its services, and what edge-config prints for it.
struct Edge {
    lab: Deployment,
    services: [Service; 2],
    relay: Running,
}

impl Edge {
    fn new() -> Self {
        let lab = Deployment::new();
        lab.wks01.write(
            "etc/instances.tsv",
            format!("echo.1\t123\t{WKS01_PRIVATE}:7777\t127.0.0.1\t{PORT}\t::1\n"),
        );
        let services =
            ["127.0.0.1", "[::1]"].map(|host| Service::echo(&lab.wks01, &format!("{host}:{PORT}")));
        let relay = lab.mmproxyctl(&[("echo.1", 7777)]).remove(0);
        Self {
            lab,
            services,
            relay,
        }
    }

    /// The client's connections over both families through the proxy on vps01.
    fn assert_seen(&self) {
        let clients = CLIENT.into_iter().zip(VPS01).zip(&self.services);
        for (number, ((client, address), service)) in (45_000..).zip(clients) {
            let mut stream = connect(&self.lab.client, client, address, number);
            exchange(&mut stream, b"through a proxy");
            let seen = service.peer();
            assert_eq!(
                (seen.ip().to_string(), seen.port()),
                (client.to_owned(), number)
            );
        }
        assert!(
            !self.relay.log().contains("refused"),
            "{}",
            self.relay.log()
        );
    }
}

fn printed(host: &Host, words: &str) -> String {
    let output = host.mmproxyctl(words).output().expect("mmproxyctl");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn connect(host: &Host, from: &str, to: &str, port: u16) -> TcpStream {
    host.enter(|| {
        let to = std::net::SocketAddr::new(to.parse().expect("an address"), PORT);
        let from = std::net::SocketAddr::new(from.parse().expect("an address"), port);
        let domain = socket2::Domain::for_address(to);
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None).expect("socket");
        socket.bind(&from.into()).expect("bind");
        socket.connect_timeout(&to.into(), SOON).expect("connect");
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(SOON)).expect("read timeout");
        stream
    })
}

#[test]
fn haproxy_loads_it() {
    let edge = Edge::new();
    let vps01 = &edge.lab.vps01;
    let snippet = printed(&edge.lab.wks01, "edge-config echo.1 haproxy");
    let file = vps01.write("haproxy.cfg", snippet);
    let checked = vps01.try_run(&format!("haproxy -c -f {}", file.display()));
    assert!(checked.status.success(), "{checked:?}");
    let said = String::from_utf8_lossy(&checked.stderr).into_owned();
    assert!(!said.contains("WARNING"), "{said}");
    let mut command = vps01.command("haproxy");
    command.arg("-db").arg("-f").arg(file);
    let _proxy = vps01.spawn(command);
    vps01.wait_listening(PORT);
    edge.assert_seen();
}

#[test]
fn nginx_loads_it() {
    let edge = Edge::new();
    let vps01 = &edge.lab.vps01;
    let snippet = printed(&edge.lab.wks01, "edge-config echo.1 nginx");
    let dir = vps01.dir().display();
    let file = vps01.write(
        "nginx.conf",
        format!(
            "include /etc/nginx/modules-enabled/*.conf;\npid {dir}/nginx.pid;\nerror_log stderr;\nevents {{}}\n{snippet}"
        ),
    );
    let checked = vps01.try_run(&format!("nginx -e stderr -t -c {}", file.display()));
    assert!(checked.status.success(), "{checked:?}");
    let mut command = vps01.command("nginx");
    command
        .args(["-e", "stderr", "-g", "daemon off;", "-c"])
        .arg(file);
    let _proxy = vps01.spawn(command);
    vps01.wait_listening(PORT);
    edge.assert_seen();
}

#[test]
fn dnsdist_loads_it() {
    let lab = Deployment::new();
    let service = unbound(&lab.wks01, &["127.0.0.1", "::1"]);
    lab.wks01.write(
        "etc/instances.tsv",
        format!("dns\t123\t{WKS01_PRIVATE}:5300\t127.0.0.1\t53\t::1\tprotocol=udp\n"),
    );
    let added = lab
        .wks01
        .mmproxyctl("pathway add-all")
        .output()
        .expect("mmproxyctl");
    assert!(added.status.success(), "{added:?}");
    let relay = lab.wks01.spawn(lab.wks01.mmproxyctl("run dns"));
    relay.wait_log("ready");
    let snippet = printed(&lab.wks01, "edge-config dns dnsdist");
    let own = format!(
        "setLocal(\"{}:53\")\naddLocal(\"[{}]:53\")\nsetACL({{\"0.0.0.0/0\", \"::/0\"}})\n",
        VPS01[0], VPS01[1]
    );
    // its health check asks for a name of the real internet
    let file = lab
        .vps01
        .write("dnsdist.conf", own + &snippet + "getServer(0):setUp()\n");
    let checked = lab
        .vps01
        .try_run(&format!("dnsdist --check-config -C {}", file.display()));
    assert!(checked.status.success(), "{checked:?}");
    let mut command = lab.vps01.command("dnsdist");
    command
        .args(["--supervised", "--disable-syslog", "-C"])
        .arg(file);
    let proxy = lab.vps01.spawn(command);
    proxy.wait_log("Listening on [");
    for (client, address) in CLIENT.into_iter().zip(VPS01) {
        let name = format!("{}.example.test", address.replace([':', '.'], "-"));
        lab.client.run(&format!(
            "dig @{address} +notcp +tries=1 +time=5 +short {name}"
        ));
        service.wait_log(&format!("info: {client} {name}. A IN"));
    }
}

#[test]
fn what_cannot_be_is_said() {
    let host = Host::new("wks01");
    host.write("etc/pathways.conf", "123\n");
    host.write(
        "etc/instances.tsv",
        "ssh\t123\t0.0.0.0:2222\t127.0.0.1\t22\t::1\nquic\t123\t10.0.0.1:443\t127.0.0.1\t443\t::1\tprotocol=udp\n",
    );
    for (words, said) in [
        ("edge-config none haproxy", "there are ssh, quic"),
        ("edge-config ssh squid", "possible values"),
        ("edge-config ssh haproxy", "--address"),
        ("edge-config quic nginx", "no PROXY header over UDP"),
        ("edge-config quic spectrum", "udp-header=spp"),
        ("edge-config ssh haproxy --public-port 0", "0"),
    ] {
        let output = host.mmproxyctl(words).output().expect("mmproxyctl");
        let shown = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{words}: {shown}");
        assert!(shown.contains(said), "{words}: {shown}");
    }
    // an NLB that waits for the client, in front of a server that speaks first, waits for ever
    let text = printed(
        &host,
        "edge-config ssh aws-nlb --address 10.0.0.1 --public-port 2200",
    );
    assert!(text.contains("first bytes of the client"), "{text}");
    assert!(text.contains("port              = 2200"), "{text}");
}
