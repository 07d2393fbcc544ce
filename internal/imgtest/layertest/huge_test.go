package layertest_test

import (
	"testing"

	"github.com/imagestack/imagestack/internal/imgtest/layertest"
	"github.com/imagestack/imagestack/layers/qcow2"
)

// TestHuge: the largest disks that the formats and their limits allow.
func TestHuge(t *testing.T) {
	type c = qcow2.CreateOptions
	for _, h := range []struct {
		f    layertest.Factory
		size int64
	}{
		{rawFactory(), 1 << 50},
		{ploopFactory(1, 1<<20), 2<<40 - 512},
		{ploopFactory(2, 16<<20), 50 << 40},
		{qcow2Factory("64K", qcow2Options{CreateOptions: c{ClusterSize: 64 << 10}}), 64 << 40},
		{qcow2Factory("512", qcow2Options{CreateOptions: c{ClusterSize: 512}}), 128 << 30},
		{qcow2Factory("2M", qcow2Options{CreateOptions: c{ClusterSize: 2 << 20}}), 1 << 50},
		{qcow2Factory("extended L2", qcow2Options{CreateOptions: c{ClusterSize: 64 << 10, ExtendedL2: true}}), 64 << 40},
		{qcow2Factory("data file", qcow2Options{CreateOptions: c{ClusterSize: 64 << 10, DataFile: "data.raw"}}), 16 << 40},
		{qcow2Factory("v2", qcow2Options{CreateOptions: c{ClusterSize: 64 << 10, Version: 2}}), 64 << 40},
	} {
		t.Run(h.f.Name, func(t *testing.T) { layertest.RunHuge(t, h.f, h.size) })
	}
}
