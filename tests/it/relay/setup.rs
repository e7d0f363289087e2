//! What the way from accept to the service costs in round trips.

use std::io::{Read, Write};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use super::lab::{Lab, Relay, SOON, Service, announce, settings};

/// Where both hosts allow it, the header and the first payload come with the SYN.
#[test]
fn a_proxy_may_open_fast() {
    const TIMES: u16 = 5;
    let lab = Lab::new();
    for host in [&lab.wks, &lab.vps] {
        // client and server
        host.sysctl("net.ipv4.tcp_fastopen", "3");
    }
    let service = Service::echo(&lab.wks, "127.0.0.1:0");
    let relay = Relay::start(&lab.wks, settings(&[service.addr]));
    for number in 0..TIMES {
        let client = format!("192.0.2.7:{}", 4000 + number);
        lab.vps.enter(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).expect("TCP_FASTOPEN_CONNECT");
            // with a cookie this sends nothing yet
            socket.connect(&relay.addr.into()).expect("connect");
            let mut stream = std::net::TcpStream::from(socket);
            stream.set_read_timeout(Some(SOON)).expect("a timeout");
            let mut bytes = announce(&client);
            bytes.extend_from_slice(b"hello");
            stream.write_all(&bytes).expect("send");
            let mut answer = [0; 5];
            stream.read_exact(&mut answer).expect("an answer");
            assert_eq!(&answer, b"hello");
        });
        assert_eq!(service.peer(), client.parse().expect("an address"));
    }
    let counted = lab.wks.run("nstat -az TcpExtTCPFastOpenPassive");
    let times: u16 = counted
        .lines()
        .find_map(|line| line.strip_prefix("TcpExtTCPFastOpenPassive"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .expect("a counter");
    // the first one only asked for the cookie
    assert_eq!(times, TIMES - 1, "{counted}");
}
