//! Many ports and addresses on one socket.

use mmproxyctl::relay::header::encode_v2;

use super::*;

#[test]
fn fifteen_hundred_ports_of_a_network_are_one_socket() {
    let rig = Rig::new(Backend::Nftables).with(
        "many\t123\t203.0.113.0/24:20000-21499\t127.0.0.1\t30000-31499\t::1\tlisten=transparent\n\
         udp\t123\t203.0.113.0/24:20000-21499\t127.0.0.1\t30000-31499\t-\tlisten=transparent,protocol=udp\n",
    );
    let relay = rig.run("run --all --manage-pathways --workers 1");
    for kind in ["-ltn", "-lun"] {
        let sockets = rig.wks.run(&format!("ss -H {kind}"));
        assert_eq!(sockets.lines().count(), 1, "{sockets}");
        assert!(sockets.contains("203.0.113.0:20000"), "{sockets}");
    }
    let descriptors =
        std::fs::read_dir(format!("/proc/{}/fd", relay.pid())).expect("its descriptors");
    let count = descriptors.count();
    assert!(count < 60, "{count} descriptors");

    let places = [
        ("203.0.113.0:20000", 30000),
        ("203.0.113.200:20000", 30000),
        ("203.0.113.7:20750", 30750),
        ("203.0.113.255:21499", 31499),
    ];
    for (number, (to, port)) in places.into_iter().enumerate() {
        let service = Service::echo(&rig.wks, &format!("127.0.0.1:{port}"));
        let client = format!("192.0.2.7:{}", 4000 + number);
        let _open = rig.connect(to, &client).expect("a connection");
        assert_eq!(service.peer(), addr(&client), "{to}");
        let conns: serde_json::Value =
            serde_json::from_str(&rig.said("conns many --json")).expect("JSON");
        let mine = conns["connections"].as_array().expect("a list").iter();
        let mut mine = mine.filter(|one| one["client"] == *client);
        let mine = mine.next().expect("the connection");
        assert_eq!(mine["port"], addr(to).port(), "{mine:#}");
        assert_eq!(mine["target"], format!("127.0.0.1:{port}"), "{mine:#}");
        let told = rig.said(&format!("explain {client}"));
        assert!(told.contains("instance  many"), "{told}");
    }
    // beyond the range, and beyond the network, nothing is taken
    for to in ["203.0.113.7:19999", "203.0.113.7:21500"] {
        assert!(rig.connect(to, "192.0.2.7:4100").is_none(), "{to}");
    }

    // one socket of the proxy and one client: where it was sent to tells the flows apart
    let proxy = rig.proxy_socket("203.0.113.0:1");
    for (to, port) in places {
        let service = udp::Service::echo(&rig.wks, &format!("127.0.0.1:{port}"));
        assert!(rig.asks(&proxy, to, "192.0.2.7:4000", SOON), "{to}");
        assert_eq!(service.peer_of(b"hello").ip(), addr("192.0.2.7:0").ip());
    }
    let status = rig.said("status many");
    assert!(status.contains("203.0.113.0/24:20000-21499"), "{status}");
    let status: serde_json::Value = serde_json::from_str(&rig.said("status --json")).expect("JSON");
    for instance in status[0]["instances"].as_array().expect("instances") {
        assert_eq!(instance["ports"][0]["port"], 20000, "{instance:#}");
        assert_eq!(instance["ports"][0]["accepted"], 2, "{instance:#}");
        assert_eq!(
            instance["ports"].as_array().map(Vec::len),
            Some(3),
            "{instance:#}"
        );
    }
}

#[test]
fn the_destination_in_the_header_behind_a_routed_address() {
    let line = |protocol: &str| {
        format!(
            "any-{protocol}\t123\t203.0.113.0/24:1-65535\t-\t-\t-\t\
             listen=transparent,protocol={protocol},target=header,destinations=10.1.0.2+fd01::2\n"
        )
    };
    for backend in [Backend::Iptables, Backend::Nftables] {
        let rig = Rig::new(backend).with(&[line("tcp"), line("udp")].concat());
        let _relay = rig.run("run --all --manage-pathways");
        for (client, destination) in [
            ("192.0.2.7:4000", "10.1.0.2:7001"),
            ("[2001:db8::7]:4000", "[fd01::2]:7002"),
        ] {
            let header = encode_v2(addr(client), addr(destination));
            let tcp = Service::echo(&rig.srv, destination);
            let mut stream = rig
                .vps
                .enter(|| TcpStream::connect_timeout(&addr("203.0.113.3:65535"), SOON))
                .expect("connect");
            stream.write_all(&header).expect("send");
            assert!(says(&mut stream), "{destination}");
            assert_eq!(tcp.peer(), addr(client));

            let udp = udp::Service::echo(&rig.srv, destination);
            let proxy = rig.proxy_socket("203.0.113.3:1");
            proxy.set_read_timeout(Some(SOON)).expect("timeout");
            let datagram = [&header[..], b"hello"].concat();
            proxy.send_to(&datagram, "203.0.113.3:1").expect("send");
            let (length, from) = proxy.recv_from(&mut [0; 16]).expect("an answer");
            assert_eq!((length, from), (5, addr("203.0.113.3:1")));
            assert_eq!(udp.peer_of(b"hello"), addr(client));
        }
    }
}
