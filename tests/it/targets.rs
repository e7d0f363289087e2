//! Targets that are names: hosts as the system's resolver knows them, containers of a real Podman. The
//! pathways follow the addresses.

mod containers;
mod header;
mod hosts;

use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Output};

use crate::relay::lab::SOON;
use crate::support::net::{Host, Running, wait_for};

/// A host with a relay, and a proxy's host.
struct Rig {
    /// 10.0.0.1, fd00::1.
    wks: Host,
    /// 10.0.0.2, fd00::2.
    vps: Host,
}

impl Rig {
    /// With this line in instances.tsv.
    fn new(line: &str) -> Self {
        let (wks, vps) = (Host::new("wks01"), Host::new("vps01"));
        wks.link(
            "eth0",
            &["10.0.0.1/24", "fd00::1/64"],
            &vps,
            "eth0",
            &["10.0.0.2/24", "fd00::2/64"],
        );
        for host in [&wks, &vps] {
            host.ip("route add default dev eth0");
            host.ip("-6 route add default dev eth0");
        }
        wks.write("etc/pathways.conf", "123\n");
        wks.write("etc/allow.txt", "10.0.0.2\n");
        wks.write("etc/instances.tsv", line);
        Self { wks, vps }
    }

    /// Runs a command until it is ready.
    fn run(&self, command: Command) -> Running {
        let running = self.wks.spawn(command);
        wait_for("the relay to be ready", || {
            running.log().contains("INFO ready")
        });
        running
    }

    fn dial(&self, to: &str) -> TcpStream {
        let to: SocketAddr = to.parse().expect("an address");
        let stream = self
            .vps
            .enter(|| TcpStream::connect_timeout(&to, SOON))
            .expect("connect to the relay");
        stream.set_read_timeout(Some(SOON)).expect("read timeout");
        stream
    }

    /// What `status` says of the targets.
    fn targets(&self) -> String {
        let output = self.wks.mmproxyctl("status --json").output();
        let output: Output = output.expect("mmproxyctl");
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        status[0]["instances"][0]["targets"].to_string()
    }

    fn wait_targets(&self, text: &str) {
        wait_for(&format!("{text} in {}", self.targets()), || {
            self.targets().contains(text)
        });
    }
}
