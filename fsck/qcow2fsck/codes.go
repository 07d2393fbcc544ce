package qcow2fsck

import "github.com/imagestack/imagestack/fsck"

// Texts that many codes share.
const (
	byPreen    = "-p does it; nothing is lost."
	losesRange = "-y makes the guest range read as zeros and names it as lost; content that is still there goes to lost+found."
)

// Codes of the header and its extensions.
var (
	codeUnreadable  = fsck.Register("qcow2.file.unreadable", fsck.Damage, "A part of the file could not be read.", "Copy the file to a healthy disk first (ddrescue), then check the copy.")
	codeTruncated   = fsck.Register("qcow2.header.truncated", fsck.Fatal, "The file ends within the header.", "Restore the image, or its metadata from a dump.")
	codeMagic       = fsck.Register("qcow2.header.magic", fsck.Fatal, "The file does not begin with the magic of qcow2.", "If all other fields fit, -y writes the magic; else this is not a qcow2 image.")
	codeVersion     = fsck.Register("qcow2.header.version", fsck.Fatal, "The version is neither 2 nor 3.", "If the fields of version 3 fit, -y sets the version; else restore the header from a dump.")
	codeClusterBits = fsck.Register("qcow2.header.cluster-bits", fsck.Fatal, "The cluster size is impossible, or contradicts all other fields.", "If exactly one size agrees with the tables, -y sets it; else restore the header from a dump.")
	codeLength      = fsck.Register("qcow2.header.header-length", fsck.Damage, "The length of the header is impossible.", "-y sets the length behind which extensions are found.")
	codeOrder       = fsck.Register("qcow2.header.refcount-order", fsck.Damage, "The width of reference counts is impossible.", "-y sets it to 16 bits and counts anew; nothing is lost.")
	codeCrypt       = fsck.Register("qcow2.header.crypt-method", fsck.Damage, "The encryption method is unknown.", "Restore the header from a dump.")
	codeIncompat    = fsck.Register("qcow2.header.incompatible-features", fsck.Fatal, "An incompatible feature that is not known is in use; nobody who does not know it may even read the image.", "Use a newer program. If the image's own table of feature names does not have it, the bit is damage, and -y clears it.")
	codeDirty       = fsck.Register("qcow2.header.dirty", fsck.Note, "The image was not closed; with lazy refcounts its counts may be wrong.", "-p clears the mark once all counts are right.")
	codeCorrupt     = fsck.Register("qcow2.header.corrupt", fsck.Damage, "A program found damage and marked the image; it can only be read.", "-p or -y clears the mark once nothing is left that is wrong.")
	codeAutoclear   = fsck.Register("qcow2.header.autoclear-features", fsck.Note, "An autoclear feature that is not known is in use.", "Nothing is wrong. A repair that writes clears the bit, as the format demands.")
	codeCompression = fsck.Register("qcow2.header.compression-type", fsck.Damage, "The compression type and its feature bit disagree.", "-y makes them agree with what decodes compressed clusters of the image.")
	codeExtL2       = fsck.Register("qcow2.header.extended-l2", fsck.Damage, "The feature bit of extended L2 entries contradicts the L2 tables.", "-y sets the bit as the tables are.")
	codeRawBit      = fsck.Register("qcow2.header.raw-data-file", fsck.Damage, "The bit of a raw external data file is set where there is none, or together with a backing file.", "-p clears the bit, which any program may do.")
	codeBackingName = fsck.Register("qcow2.header.backing-name", fsck.Damage, "The name of the backing file is not where the header says.", "-y points the header to the name where it is found; else set it with image-stack rebase.")
	codeExtLength   = fsck.Register("qcow2.header.extension-length", fsck.Damage, "A header extension reaches behind the header.", "-y drops it and those behind it.")
	codeExtTwice    = fsck.Register("qcow2.header.extension-twice", fsck.Damage, "A header extension appears twice.", "-y keeps the first.")
	codeSize        = fsck.Register("qcow2.header.size", fsck.Damage, "The size of the virtual disk is impossible, or zero although data is mapped.", "-y sets it to what the L1 table covers, or to the end of what is mapped.")
	codeL1Size      = fsck.Register("qcow2.header.l1-size", fsck.Damage, "The L1 table has fewer entries than the disk needs, or more than is possible.", "-y sets the number of entries where the table goes on, makes a larger table, or makes the disk as small as the table.")
	codeL1Offset    = fsck.Register("qcow2.header.l1-offset", fsck.Fatal, "The L1 table is not where the header says: all is lost that is not found otherwise.", "If a table is found at the cluster boundary before it, -y takes that; else restore the metadata from a dump, or use --scavenge.")
	codeFeatures    = fsck.Register("qcow2.header.reserved", fsck.Note, "A compatible feature that is not known is in use.", "Nothing is wrong.")
)

// Codes of the map.
var (
	codeL1Reserved  = fsck.Register("qcow2.l1.reserved-bits", fsck.Damage, "Reserved bits are set in an L1 entry.", "-p clears them where the rest of the entry is right; else "+losesRange)
	codeL1Unaligned = fsck.Register("qcow2.l1.entry-unaligned", fsck.Damage, "An L1 entry names an L2 table that is not on a cluster boundary.", "-y clears the entry and names the guest range as lost.")
	codeL1PastEOF   = fsck.Register("qcow2.l1.entry-past-eof", fsck.Damage, "An L1 entry names an L2 table behind the end of the file.", "-y clears the entry and names the guest range as lost.")
	codeL1Metadata  = fsck.Register("qcow2.l1.entry-into-metadata", fsck.Damage, "An L1 entry names a cluster that holds other metadata.", "-y clears the entry and names the guest range as lost.")
	codeL1NoTable   = fsck.Register("qcow2.l1.not-a-table", fsck.Damage, "An L1 entry names a cluster that does not hold an L2 table.", "-y clears the entry, names the guest range as lost and keeps the cluster in lost+found.")
	codeL1Duplicate = fsck.Register("qcow2.l1.duplicate", fsck.Damage, "Two L1 entries for different guest ranges name the same L2 table.", "-y leaves the table to one of them, by evidence of the guest where there is some, and names both ranges as in doubt.")
	codeL1CopiedSet = fsck.Register("qcow2.l1.copied-set", fsck.Damage, "The COPIED flag of an L1 entry is set although the L2 table is shared: a write would change snapshots.", byPreen)
	codeL1CopiedOff = fsck.Register("qcow2.l1.copied-clear", fsck.Leak, "The COPIED flag of an L1 entry is clear although the L2 table is not shared.", byPreen)
	codeL2Cut       = fsck.Register("qcow2.l2.table-cut", fsck.Damage, "The file ends within an L2 table.", "-y makes the file longer; entries that were cut off are unmapped, and their guest range is named as lost.")
	codeL2Reserved  = fsck.Register("qcow2.l2.reserved-bits", fsck.Damage, "Reserved bits are set in an L2 entry.", "-p clears them where the rest of the entry is right; else "+losesRange)
	codeL2Unaligned = fsck.Register("qcow2.l2.entry-unaligned", fsck.Damage, "An L2 entry names a cluster that is not on a cluster boundary.", losesRange)
	codeL2PastEOF   = fsck.Register("qcow2.l2.entry-past-eof", fsck.Damage, "An L2 entry names a cluster behind the end of the file.", losesRange)
	codeL2Metadata  = fsck.Register("qcow2.l2.entry-into-metadata", fsck.Damage, "An L2 entry names a cluster that holds metadata: a write by the guest would destroy it.", losesRange)
	codeL2Duplicate = fsck.Register("qcow2.l2.duplicate", fsck.Damage, "Several guest clusters, or a plain and a compressed one, are stored in the same cluster.", "-y leaves it to one, by evidence of the guest where there is some, copies it for the others, and names all of them as in doubt. More than 16 claims on one cluster are no accident: those from the 17th on are made zeros, and so are those for which more would have to be copied than the image takes, or 1 GiB.")
	codeL2CopiedSet = fsck.Register("qcow2.l2.copied-set", fsck.Damage, "The COPIED flag of an L2 entry is set although the cluster is shared: a write would change snapshots.", byPreen)
	codeL2CopiedOff = fsck.Register("qcow2.l2.copied-clear", fsck.Leak, "The COPIED flag of an L2 entry is clear although the cluster is not shared.", byPreen)
	codeL2Copied0   = fsck.Register("qcow2.l2.copied-unmapped", fsck.Damage, "The COPIED flag is set in an L2 entry that names no cluster.", byPreen)
	codeL2ZeroV2    = fsck.Register("qcow2.l2.zero-flag-v2", fsck.Damage, "The zero flag is set in a version 2 image, which has none.", "-p clears it where the entry names a cluster in use; else -y does and names the guest range.")
	codeL2Bit0      = fsck.Register("qcow2.l2.zero-flag-extended", fsck.Damage, "Bit 0 is set in an extended L2 entry.", byPreen)
	codeL2AllocZero = fsck.Register("qcow2.l2.subcluster-both", fsck.Damage, "A subcluster is both allocated and zero.", "-y takes it as allocated and names its guest range as in doubt.")
	codeL2AllocNone = fsck.Register("qcow2.l2.subcluster-unmapped", fsck.Damage, "Subclusters are allocated in an entry that names no cluster.", "-y makes them zero and names the guest range as lost.")
	codeDataCut     = fsck.Register("qcow2.data.cut", fsck.Damage, "The file ends within a data cluster.", "-y makes the file longer and names what was cut off as lost.")
	codePackedBits  = fsck.Register("qcow2.packed.reserved-bits", fsck.Damage, "Reserved bits, the COPIED flag among them, are set in a compressed cluster descriptor.", "-p clears them where the payload then decodes; else "+losesRange)
	codePackedEOF   = fsck.Register("qcow2.packed.past-eof", fsck.Damage, "A compressed cluster lies behind the end of the file.", losesRange)
	codePackedLong  = fsck.Register("qcow2.packed.too-long", fsck.Damage, "The sector count of a compressed cluster reaches into clusters that are not its own.", "-p sets the count that its stream needs.")
	codePackedMeta  = fsck.Register("qcow2.packed.into-metadata", fsck.Damage, "A compressed cluster lies in metadata.", losesRange)
	codePackedData  = fsck.Register("qcow2.packed.payload", fsck.Damage, "The payload of a compressed cluster does not decode.", "-y keeps the compressed bytes in lost+found, makes the cluster zeros and names it as lost.")
	codePackedExt   = fsck.Register("qcow2.packed.external", fsck.Damage, "A compressed cluster in an image with an external data file, which cannot have any.", losesRange)
	codeExtMismatch = fsck.Register("qcow2.datafile.offset", fsck.Damage, "The offset in the external data file is not the guest offset.", "-p sets it, because the format allows no other.")
	codeDataMissing = fsck.Register("qcow2.datafile.unavailable", fsck.Note, "The external data file could not be looked at.", "Give the permission (--allow-path) or the file.")
	codeDataNoName  = fsck.Register("qcow2.datafile.no-name", fsck.Damage, "The image has an external data file and does not name it.", "Set the name with qemu-img amend -o data_file=NAME.")
	codeDataShort   = fsck.Register("qcow2.datafile.short", fsck.Damage, "The external data file ends before what is mapped in it.", "Restore the data file; if its end is really lost, make it long enough with truncate(1).")
)

// Codes of the reference counts.
var (
	codeRTHeader      = fsck.Register("qcow2.reftable.header", fsck.Damage, "The refcount table is not where the header says.", "-p makes a new one; nothing is lost.")
	codeRTReserved    = fsck.Register("qcow2.reftable.reserved-bits", fsck.Damage, "Reserved bits are set in an entry of the refcount table.", byPreen)
	codeRTUnaligned   = fsck.Register("qcow2.reftable.entry-unaligned", fsck.Damage, "An entry of the refcount table names a block that is not on a cluster boundary.", "-p makes a new block; nothing is lost.")
	codeRTPastEOF     = fsck.Register("qcow2.reftable.entry-past-eof", fsck.Damage, "An entry of the refcount table names a block behind the end of the file.", "-p makes a new block; nothing is lost.")
	codeRTMetadata    = fsck.Register("qcow2.reftable.entry-into-metadata", fsck.Damage, "An entry of the refcount table names a cluster that holds something else.", "-p makes a new block; nothing is lost.")
	codeRTShared      = fsck.Register("qcow2.reftable.entry-shared", fsck.Damage, "Two entries of the refcount table name the same block.", "-p makes a new block for one of them; nothing is lost.")
	codeRTMissing     = fsck.Register("qcow2.reftable.block-missing", fsck.Damage, "Clusters are in use that no refcount block counts: they would be given away again.", "-p makes a block; nothing is lost.")
	codeRefLow        = fsck.Register("qcow2.refcount.too-low", fsck.Damage, "Clusters have more references than are counted: they may be freed, or written in place, while others need them.", byPreen)
	codeRefHigh       = fsck.Register("qcow2.refcount.too-high", fsck.Leak, "Clusters have fewer references than are counted, so that they would never be freed.", byPreen)
	codeRefHighCopied = fsck.Register("qcow2.refcount.too-high-copied", fsck.Leak, "Data clusters have fewer references than are counted, so that they would never be freed; the COPIED flag of their entry, by which they are written in place, is right all the same.", byPreen)
	codeRefLeak       = fsck.Register("qcow2.refcount.leak", fsck.Leak, "Clusters are counted that nothing refers to.", "-p frees them. When the map is damaged they may be what it referred to: then only -y frees them, and keeps their content in lost+found.")
	codeRefTooNarrow  = fsck.Register("qcow2.refcount.overflow", fsck.Damage, "A cluster has more references than a count of the image's width can say.", "-y copies it, or the compressed clusters in it, for some of its owners; a cluster that more snapshots share than can be counted needs some of them deleted.")
)

// Codes of snapshots and bitmaps.
var (
	codeSnapTable   = fsck.Register("qcow2.snapshots.table", fsck.Damage, "The snapshot table is not where the header says, or its length is impossible.", "-y drops all snapshots.")
	codeSnapEntry   = fsck.Register("qcow2.snapshots.entry-cut", fsck.Damage, "An entry of the snapshot table cannot be read, so that those behind it cannot be found.", "-y drops it and those behind it.")
	codeSnapExtra   = fsck.Register("qcow2.snapshots.extra-long", fsck.Damage, "A snapshot has more than 1024 bytes of extra data.", "-y keeps the first 1024 bytes.")
	codeSnapShort   = fsck.Register("qcow2.snapshots.extra-short", fsck.Damage, "A snapshot lacks the extra data that version 3 demands.", "-p adds it: the size of its disk is taken to be that of the image, as in version 2.")
	codeSnapL1      = fsck.Register("qcow2.snapshots.l1", fsck.Damage, "The L1 table of a snapshot is not where its entry says.", "-y drops the snapshot.")
	codeSnapL1Small = fsck.Register("qcow2.snapshots.l1-size", fsck.Damage, "The L1 table of a snapshot has fewer entries than its disk needs.", "-y sets the number of entries where the table goes on, or makes the snapshot's disk smaller.")
	codeSnapID      = fsck.Register("qcow2.snapshots.id", fsck.Note, "Two snapshots have the same ID, or one has none.", "Nothing is lost; delete one of them by name.")
	codeBmStale     = fsck.Register("qcow2.bitmaps.stale", fsck.Leak, "The image has bitmaps that a program which does not know them has made invalid by writing.", "-p drops them; they may not be used any more.")
	codeBmDir       = fsck.Register("qcow2.bitmaps.directory", fsck.Damage, "The directory of bitmaps is damaged.", "-y drops all bitmaps; the next incremental backup has to be a full one.")
	codeBmEntry     = fsck.Register("qcow2.bitmaps.table-entry", fsck.Damage, "An entry of a bitmap's table is impossible.", "-y clears it and marks the bitmap as inconsistent.")
	codeBmNoExt     = fsck.Register("qcow2.bitmaps.no-extension", fsck.Note, "The bit says that bitmaps are valid, but there are none.", "Nothing is wrong.")
)
