from dsconv_surgery.cli import main

main()
