//! Where instances listen: Unix sockets for a proxy on the same host, ranges of ports.

mod ranges;
mod unix;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::Output;

use serde_json::Value;

use crate::relay::lab::Service;
use crate::support::net::{Host, Running, wait_for};

/// A host with services and one process that runs every instance, and a host beyond it.
struct Rig {
    /// 10.0.0.1, fd00::1.
    wks: Host,
    /// 10.0.0.2, fd00::2.
    vps: Host,
    service: Service,
    service6: Service,
}

impl Rig {
    /// Nothing is configured beyond the pathway and the allow list.
    fn new() -> Self {
        let (wks, vps) = (Host::new("wks01"), Host::new("vps01"));
        wks.link(
            "eth0",
            &["10.0.0.1/24", "fd00::1/64"],
            &vps,
            "eth0",
            &["10.0.0.2/24", "fd00::2/64"],
        );
        let service = Service::echo(&wks, "127.0.0.1:0");
        let service6 = Service::echo(&wks, &format!("[::1]:{}", service.addr.port()));
        wks.write("etc/pathways.conf", "123 connmark=auto\n");
        wks.write("etc/allow.txt", "10.0.0.2\nfd00::2\n");
        Self {
            wks,
            vps,
            service,
            service6,
        }
    }

    /// Writes instances.tsv.
    fn instances(&self, lines: &str) {
        self.wks.write("etc/instances.tsv", lines);
    }

    /// A process that is ready.
    fn run(&self) -> Running {
        self.run_with("")
    }

    fn run_with(&self, words: &str) -> Running {
        let words = format!("-v run --all --manage-pathways {words}");
        let running = self.wks.spawn(self.wks.mmproxyctl(&words));
        wait_for("the relays to be ready", || {
            running.log().contains("INFO ready")
        });
        running
    }

    fn ctl(&self, words: &str) -> Output {
        self.wks.mmproxyctl(words).output().expect("mmproxyctl")
    }

    /// stdout of a verb that succeeds.
    fn said(&self, words: &str) -> String {
        let output = self.ctl(words);
        assert!(output.status.success(), "{words}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    /// The open connections of all instances.
    fn conns(&self) -> Vec<Value> {
        let listing: Value = serde_json::from_str(&self.said("conns --json")).expect("JSON");
        listing["connections"].as_array().expect("a list").clone()
    }
}

/// Announces a client and checks that the echo service answers.
pub(crate) fn relayed(mut stream: impl Read + Write, header: &[u8]) {
    stream.write_all(header).expect("send the header");
    stream.write_all(b"hello").expect("send");
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).expect("receive");
    assert_eq!(&answer, b"hello");
}

fn addr(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}
