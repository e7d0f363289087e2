//! `target=header`: the destination in the PROXY header is the target, as far as `destinations=` lets it.

use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};

use mmproxyctl::relay::header::encode_v2;

use super::Rig;
use crate::relay::lab::{SOON, Service};
use crate::udp::lab as udp;

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A process with this instance, its pathway in place.
fn run(rig: &Rig) -> crate::support::net::Running {
    rig.run(rig.wks.mmproxyctl("run --all --manage-pathways"))
}

#[test]
fn connections_go_where_the_header_says_within_limits() {
    let rig = Rig::new(
        "any\t123\t10.0.0.1:2222\t-\t-\t-\ttarget=header,destinations=10.0.0.1/32+fd00::1+127.0.0.1\n",
    );
    rig.wks.address("eth0", "10.0.0.3/24");
    let relay = run(&rig);
    for (service, client) in [
        ("10.0.0.1:7001", "192.0.2.7:4000"),
        ("10.0.0.1:7002", "192.0.2.7:4001"),
        ("127.0.0.1:7003", "192.0.2.7:4002"),
        ("[fd00::1]:7001", "[2001:db8::7]:4000"),
    ] {
        let service = Service::echo(&rig.wks, service);
        let header = encode_v2(addr(client), service.addr);
        let stream = rig.dial("10.0.0.1:2222");
        crate::listen::relayed(&stream, &header);
        assert_eq!(service.peer(), addr(client));
        let conns = rig.wks.mmproxyctl("conns --json").output().expect("conns");
        let conns = String::from_utf8_lossy(&conns.stdout).into_owned();
        assert!(
            conns.contains(&format!("\"target\": \"{}\"", service.addr)),
            "{conns}"
        );
    }
    // a health check has none
    let mut stream = rig.dial("10.0.0.1:2222");
    stream.write_all(b"PROXY UNKNOWN\r\n").expect("send");
    assert!(!matches!(stream.read(&mut [0; 8]), Ok(1..)));
    relay.wait_log("names no destination");
    // not in the list, no address, no port, and another family than the client's
    let _service = Service::echo(&rig.wks, "10.0.0.3:7001");
    for (client, destination) in [
        ("192.0.2.7:4010", "10.0.0.3:7001"),
        ("192.0.2.7:4011", "0.0.0.0:7001"),
        ("192.0.2.7:4012", "10.0.0.1:0"),
        ("192.0.2.7:4013", "127.0.0.2:7003"),
        ("[2001:db8::7]:4014", "[::1]:7003"),
    ] {
        let mut stream = rig.dial("10.0.0.1:2222");
        let header = encode_v2(addr(client), addr(destination));
        stream.write_all(&header).expect("send");
        assert!(
            !matches!(stream.read(&mut [0; 8]), Ok(1..)),
            "{destination}"
        );
        // five of a kind about one proxy are said, the rest is counted
        if destination != "[::1]:7003" {
            relay.wait_log(&format!("refused: the destination {destination}"));
        }
    }
    let status = rig.wks.mmproxyctl("status any").output().expect("status");
    let status = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(status.contains("6 destination-refused"), "{status}");
    // the pathway serves what may be asked for
    let rules = [rig.wks.ip("rule"), rig.wks.ip("-6 rule")].concat();
    for prefix in ["from 10.0.0.1 fwmark 0x7b", "from fd00::1 fwmark 0x7b"] {
        assert!(rules.contains(prefix), "{rules}");
    }
}

#[test]
fn datagrams_of_one_client_go_to_several_services() {
    for mode in ["every", "first"] {
        let rig = Rig::new(&format!(
            "any\t123\t10.0.0.1:5300\t-\t-\t-\t\
             protocol=udp,udp-header={mode},target=header,destinations=10.0.0.1+fd00::1\n"
        ));
        let _relay = run(&rig);
        let services = ["10.0.0.1:7001", "10.0.0.1:7002", "[fd00::1]:7001"]
            .map(|at| udp::Service::echo(&rig.wks, at));
        let proxy = rig
            .vps
            .enter(|| UdpSocket::bind("10.0.0.2:4444"))
            .expect("bind");
        proxy.set_read_timeout(Some(SOON)).expect("read timeout");
        for round in 0..2 {
            for service in &services {
                let client = match service.addr {
                    SocketAddr::V4(_) => "192.0.2.7:4000",
                    SocketAddr::V6(_) => "[2001:db8::7]:4000",
                };
                let payload = format!("{mode} {round} to {}", service.addr);
                let header = encode_v2(addr(client), service.addr);
                let datagram = [&header[..], payload.as_bytes()].concat();
                proxy.send_to(&datagram, "10.0.0.1:5300").expect("send");
                let mut answer = [0; 100];
                let (length, _) = proxy.recv_from(&mut answer).expect("an answer");
                assert_eq!(&answer[..length], payload.as_bytes());
                let peer = service.peer_of(payload.as_bytes());
                assert_eq!(peer.ip(), addr(client).ip());
            }
        }
        // elsewhere: nothing comes back, and nothing arrives
        let header = encode_v2(addr("192.0.2.7:4000"), addr("10.0.0.2:7001"));
        proxy
            .send_to(&[&header[..], b"x"].concat(), "10.0.0.1:5300")
            .expect("send");
        let log = || {
            let status = rig.wks.mmproxyctl("status any").output().expect("status");
            String::from_utf8_lossy(&status.stdout).into_owned()
        };
        crate::support::net::wait_for("the refusal", || log().contains("1 destination-refused"));
    }
}
