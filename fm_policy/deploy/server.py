"""LeRobot's policy server, for the policies of this package: `fm-policy-server --host=127.0.0.1 --port=8080 --fps=10`.

The server computes chunks for a robot on another machine, whose program is LeRobot's own client, unchanged
(`python -m lerobot.async_inference.robot_client`). LeRobot's server knows its own types of policies only, loads no
plug-ins, and may answer no more after it failed once: this program adds what it lacks, and takes its flags.

LeRobot's client and server unpickle what they are sent: whoever reaches the port can run code. Keep it on `localhost`,
or on a network where everybody is trusted.
"""

from lerobot.utils.import_utils import register_third_party_plugins

POLICIES = ("fm_ft",)


def main() -> None:
    """Serve until the process is ended; the arguments are those of LeRobot's server.

    Raises:
        ModuleNotFoundError: If grpcio, which the server speaks, is not installed.
    """
    register_third_party_plugins()
    try:
        from lerobot.async_inference import constants

        from fm_policy.deploy import async_server
    except ModuleNotFoundError as error:
        from env_configs.extras import not_installed

        raise not_installed(error, "robot") from error
    # The list that the server looks its policies up in; LeRobot has no other way to add one.
    constants.SUPPORTED_POLICIES.extend(name for name in POLICIES if name not in constants.SUPPORTED_POLICIES)
    async_server.serve()


if __name__ == "__main__":
    main()
