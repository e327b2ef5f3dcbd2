#!/usr/bin/env bash
# Lets an ordinary user make network namespaces, which tests/functional/L2_TwoNodes_*.sh need and Ubuntu's AppArmor forbids. For CI runners.
set -euo pipefail
setting=kernel.apparmor_restrict_unprivileged_userns
if [ "$(sysctl -n "$setting" 2>/dev/null || echo 0)" != 0 ]; then
  sudo sysctl -w "$setting=0"
fi
