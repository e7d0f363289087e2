//! `-listen-transparent` and `-dynamic-destination` of go-mmproxy's forks, with rules of one's own.

use mmproxyctl::relay::header::encode_v2;

use super::*;

/// The rules that such a set-up brings along: everything for these ports, to the wildcard socket.
fn rules_of_their_own(rig: &Rig) {
    for (program, family) in [("iptables", ""), ("ip6tables", "-6")] {
        for protocol in ["tcp", "udp"] {
            rig.wks.run(&format!(
                "{program} -t mangle -A PREROUTING -i eth0 -p {protocol} --dport 5000:6000 \
                 -j TPROXY --on-port 8443 --tproxy-mark 0x1/0x1"
            ));
        }
        rig.wks
            .ip(&format!("{family} rule add fwmark 0x1/0x1 lookup 100"));
        rig.wks.ip(&format!(
            "{family} route add local default dev lo table 100"
        ));
        // the answers of the service
        rig.wks
            .ip(&format!("{family} rule add iif eth1 lookup 100"));
    }
}

#[test]
fn both_flags_under_the_old_name() {
    let rig = Rig::new(Backend::Iptables).with("");
    rules_of_their_own(&rig);
    let link = rig.wks.dir().join("go-mmproxy");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mmproxyctl"), &link).expect("a link");
    let run = |words: &str| {
        let mut command = rig.wks.command(&link);
        command
            .args(words.split_whitespace())
            .env_remove("MMPROXY_CONFIG_DIR")
            .env("RUNTIME_DIRECTORY", rig.wks.dir().join("run"));
        let running = rig.wks.spawn(command);
        running.wait_log("ready");
        running
    };
    let places = [
        ("203.0.113.5:5500", "192.0.2.7:4000", "10.1.0.2:7000"),
        (
            "[2001:db8:5::5]:5500",
            "[2001:db8::7]:4000",
            "[fd01::2]:7000",
        ),
    ];
    // the ports of this host itself, too
    let own = [("10.0.0.1:5501", "192.0.2.7:4001", "10.1.0.2:7000")];
    let fixed = "-l 0.0.0.0:8443 -4 10.1.0.2:7000 -6 [fd01::2]:7000 -listen-transparent";
    {
        let relay = run(fixed);
        relay.wait_log("-listen-transparent: the TPROXY rules are your own");
        for (to, client, service) in places.iter().chain(&own) {
            let service = Service::echo(&rig.srv, service);
            assert!(rig.connect(to, client).is_some(), "{to}: {}", relay.log());
            assert_eq!(service.peer(), addr(client));
        }
        // what comes to its own port is served as before
        let service = Service::echo(&rig.srv, "10.1.0.2:7000");
        assert!(rig.connect("10.0.0.1:8443", "192.0.2.7:4002").is_some());
        assert_eq!(service.peer(), addr("192.0.2.7:4002"));
    }
    {
        let relay = run(&format!("{fixed} -p udp"));
        for (to, client, service) in places.iter().chain(&own) {
            let service = udp::Service::echo(&rig.srv, service);
            let proxy = rig.proxy_socket(to);
            assert!(rig.asks(&proxy, to, client, SOON), "{to}: {}", relay.log());
            assert_eq!(service.peer_of(b"hello"), addr(client));
        }
        // a socket that was answered from does not stay on a port of this host's
        let sockets = rig.wks.run("ss -Hlun sport = :5501");
        assert_eq!(sockets, "");
    }
    {
        let relay = run("-l 0.0.0.0:8443 -listen-transparent -dynamic-destination");
        relay.wait_log(
            "-dynamic-destination: who is believed can have a connection made to any address",
        );
        for (number, (to, client, _)) in places.iter().enumerate() {
            let destination = ["10.1.0.2:7700", "[fd01::2]:7701"][number];
            let service = Service::echo(&rig.srv, destination);
            let mut stream = rig
                .vps
                .enter(|| TcpStream::connect_timeout(&addr(to), SOON))
                .expect("connect");
            let header = encode_v2(addr(client), addr(destination));
            stream.write_all(&header).expect("send");
            assert!(says(&mut stream), "{destination}: {}", relay.log());
            assert_eq!(service.peer(), addr(client));
        }
    }
    // nothing was made, nothing removed
    let saved = rig.wks.run("iptables-save") + &rig.wks.run("ip6tables-save");
    assert_eq!(saved.matches("TPROXY").count(), 4, "{saved}");
    assert!(!saved.contains("mmproxyctl"), "{saved}");
}
